"""Models of every family, written and read back by the file's own reader and by llama.cpp."""

import pytest

from dpo_wrapper.commands.export.agreement import ExportError, compare
from dpo_wrapper.commands.export.gguf.families import find_family
from dpo_wrapper.commands.export.gguf.file_reader import GGUFFileReader
from dpo_wrapper.commands.export.gguf.llama_cpp_reader import LlamaCppReader
from dpo_wrapper.commands.export.gguf.model_file import digest_weights, write_base_gguf
from dpo_wrapper.commands.export.gguf.storage import TENSOR_TYPES
from helpers.gguf_models import MODELS, ask, edit_tensor, make_known_model, make_model, set_value

ROUNDING = {"float32": 1e-6, "bfloat16": 2e-2, "float16": 2e-3, "q8_0": 2e-2}


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_read_back_from_the_file_alone(name, chatml_tokenizer, tmp_path):
    model = make_known_model(name)
    outputs = ask(model, chatml_tokenizer)
    write_base_gguf(model, chatml_tokenizer, tmp_path / "model.gguf", "float32")
    agreement = compare(outputs, GGUFFileReader(tmp_path / "model.gguf"), 1e-6)
    agreement.check()
    assert agreement.num_equal == agreement.num_tokens == 16


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_the_same_in_llama_cpp(name, chatml_tokenizer, tmp_path):
    pytest.importorskip("llama_cpp")
    model = make_known_model(name)
    outputs = ask(model, chatml_tokenizer)
    write_base_gguf(model, chatml_tokenizer, tmp_path / "model.gguf", "float32")
    reader = LlamaCppReader(tmp_path / "model.gguf", max(len(output.ids) for output in outputs))
    try:
        compare(outputs, reader, 1e-6 + find_family(model).llama_cpp_rounding).check()
    finally:
        reader.close()


@pytest.mark.parametrize("stored", TENSOR_TYPES)
def test_weights_are_stored_in_fewer_bits_and_vectors_are_not(stored, chatml_tokenizer, tmp_path):
    from gguf import GGUFReader

    model = make_known_model("llama-biases")
    outputs = ask(model, chatml_tokenizer)
    file = tmp_path / "model.gguf"
    write_base_gguf(model, chatml_tokenizer, file, stored)
    compare(outputs, GGUFFileReader(file), ROUNDING[stored]).check()
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    vectors = {name for name in types if name.endswith(".bias") or "norm" in name}
    assert {types.pop(name) for name in vectors} == {"F32"}
    assert set(types.values()) == {TENSOR_TYPES[stored]}


def test_rows_without_whole_blocks_are_in_16_bits(chatml_tokenizer, tmp_path):
    from gguf import GGUFReader

    model = make_model("LlamaConfig", intermediate_size=80)
    write_base_gguf(model, chatml_tokenizer, tmp_path / "model.gguf", "q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == types["token_embd.weight"] == "Q8_0"


@pytest.mark.parametrize(
    ("name", "change"),
    {
        "rows of queries in the order of transformers": (
            "llama",
            lambda file: edit_tensor(
                file,
                "blk.1.attn_q.weight",
                lambda rows: rows.reshape(4, 8, 2, 64).swapaxes(1, 2).reshape(64, 64),
            ),
        ),
        "norms without the 1": (
            "gemma2",
            lambda file: edit_tensor(file, "blk.0.attn_norm.weight", lambda gain: gain - 1),
        ),
        "a scaled matrix": (
            "qwen2",
            lambda file: edit_tensor(file, "blk.1.ffn_down.weight", lambda rows: rows * 1.01),
        ),
        "another base of positions": (
            "qwen3",
            lambda file: set_value(file, "qwen3.rope.freq_base", 20000.0),
        ),
        "another factor of positions": (
            "llama-linear",
            lambda file: set_value(file, "llama.rope.scaling.factor", 2.0),
        ),
        "another window": (
            "gemma3",
            lambda file: set_value(file, "gemma3.attention.sliding_window", 8),
        ),
        "another cap": (
            "gemma2",
            lambda file: set_value(file, "gemma2.final_logit_softcapping", 30.0),
        ),
        "factors by frequency": (
            "llama-3",
            lambda file: edit_tensor(file, "rope_freqs.weight", lambda factors: factors**0),
        ),
    }.values(),
)
def test_a_changed_file_is_found(name, change, chatml_tokenizer, tmp_path):
    model = make_known_model(name)
    outputs = ask(model, chatml_tokenizer)
    file = tmp_path / "model.gguf"
    write_base_gguf(model, chatml_tokenizer, file, "float32")
    change(file)
    with pytest.raises(ExportError, match="does not"):
        compare(outputs, GGUFFileReader(file), 1e-4).check()


def test_a_wrong_token_type_is_found(chatml_tokenizer, tmp_path):
    from gguf import TokenType

    model = make_known_model("llama")
    outputs = ask(model, chatml_tokenizer)
    file = tmp_path / "model.gguf"
    write_base_gguf(model, chatml_tokenizer, file, "float32")
    index = chatml_tokenizer.tokenizer.convert_tokens_to_ids("<|im_start|>")
    set_value(file, "tokenizer.ggml.token_type", TokenType.NORMAL, index)
    with pytest.raises(ExportError, match="should read the prompt"):
        compare(outputs, GGUFFileReader(file), 1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_single_changed_bit_is_found(dtype, chatml_tokenizer, tmp_path):
    model = make_known_model("phi3")
    file = tmp_path / "model.gguf"
    write_base_gguf(model, chatml_tokenizer, file, dtype)
    weights = digest_weights(model, dtype)
    GGUFFileReader(file, weights)

    def flip(rows):
        rows.view("uint8")[0, 0] ^= 1
        return rows

    edit_tensor(file, "blk.1.ffn_down.weight", flip)
    with pytest.raises(
        ExportError, match=r"1 of 15 tensors are others \(model.layers.1.mlp.down_proj.weight"
    ):
        GGUFFileReader(file, weights)
