"""`dpo-wrapper export --to gguf`: what it writes loads again, and what it cannot write it refuses."""

import json
import shutil
import sys

import pytest
import torch

from dpo_wrapper.commands.export.agreement import ExportError, compare
from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.commands.export.gguf import storage
from dpo_wrapper.commands.export.gguf.families import find_family
from dpo_wrapper.commands.export.gguf.file_reader import GGUFFileReader
from dpo_wrapper.commands.export.gguf.hyperparameters import add_hyperparameters
from dpo_wrapper.commands.export.gguf.model_file import write_base_gguf
from dpo_wrapper.commands.export.gguf.tensors import convert_tensors
from dpo_wrapper.commands.export.run import run_export
from dpo_wrapper.pretrained import load_pretrained
from helpers.gguf_models import MODELS, ask, make_known_model, make_model
from helpers.lora_runs import save_decoder
from helpers.models import hf_gpt2

IDS = torch.arange(20)[None]


def save_base(folder, tokenizer, name):
    make_known_model(name).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def save_adapter(folder, base):
    """LoRA of random factors on a base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def export(model, out, **options):
    config = ExportConfig(model=str(model), to=("gguf",), out=out, num_tokens=4, **options)
    return run_export(config), out / "gguf"


@torch.no_grad()
def logits_of(folder):
    return load_pretrained(str(folder), None, 64).model.eval()(IDS).logits


@pytest.mark.parametrize("name", ["llama-3", "mistral", "gemma", "gemma3", "qwen2-tied-yarn", "phi3-long"])
def test_an_export_loads_again(name, chatml_tokenizer, tmp_path, capsys):
    base = save_base(tmp_path / "base", chatml_tokenizer, name)
    status, folder = export(base, tmp_path / "out", dtype="float32")
    assert status == 0
    said, error = capsys.readouterr()
    assert "GGUF" not in error  # no bar of transformers
    assert f"llama-cli -m {folder / 'model.gguf'}" in said and "12 of 12 greedy tokens" in said
    assert ("to the bit" in said) != name.startswith("gemma")  # to whose norms 1 is added
    assert json.loads((folder / "export.json").read_text())["status"] == "verified"
    torch.testing.assert_close(logits_of(folder), logits_of(base), rtol=1e-4, atol=1e-4)
    tokenizers = [load_pretrained(str(one), None, 64).tokenizer for one in (base, folder)]
    assert tokenizers[0].fingerprint() == tokenizers[1].fingerprint()


def test_an_adapter_is_merged(chatml_tokenizer, tmp_path):
    base = save_base(tmp_path / "base", chatml_tokenizer, "llama")
    adapter = save_adapter(tmp_path / "adapter", base)
    status, folder = export(adapter, tmp_path / "out", dtype="float32")
    assert status == 0
    expected = logits_of(adapter)
    torch.testing.assert_close(logits_of(folder), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits_of(base)).abs().max() > 0.1


def test_an_adapter_is_merged_once_for_two_formats(chatml_tokenizer, tmp_path):
    base = save_base(tmp_path / "base", chatml_tokenizer, "llama")
    adapter = save_adapter(tmp_path / "adapter", base)
    formats = ("merged", "gguf")
    options = {"dtype": "float32", "num_tokens": 4}
    assert run_export(ExportConfig(model=str(adapter), to=formats, out=tmp_path / "out", **options)) == 0
    torch.testing.assert_close(logits_of(tmp_path / "out" / "gguf"), logits_of(tmp_path / "out" / "merged"))


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("mistral", "no sliding window for this architecture: beyond 128 tokens"),
        ("phi3-long", "run it with -c 256 for texts that are shorter"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_noted(name, note, chatml_tokenizer, tmp_path):
    notes = write_base_gguf(make_known_model(name), chatml_tokenizer, tmp_path / "model.gguf", "float32")
    assert [note in sentence for sentence in notes] == [True]


def test_llama_cpp_quantizes_to_4_bits(chatml_tokenizer, tmp_path, capfd):
    pytest.importorskip("llama_cpp")
    from gguf import GGUFReader

    model = make_model("LlamaConfig", hidden_size=256, intermediate_size=256)
    write_base_gguf(model, chatml_tokenizer, tmp_path / "float32.gguf", "float32")
    storage.quantize_by_llama_cpp(tmp_path / "float32.gguf", tmp_path / "model.gguf")
    assert "".join(capfd.readouterr()) == ""
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == "Q4_K" and types["output.weight"] == "Q6_K"
    assert compare(ask(model, chatml_tokenizer), GGUFFileReader(tmp_path / "model.gguf"), 1).difference < 0.5
    storage.check_quantizer("q4_k_m")


def test_a_file_that_llama_cpp_cannot_quantize_is_an_error(tmp_path):
    pytest.importorskip("llama_cpp")
    (tmp_path / "float32.gguf").write_text("no weights")
    with pytest.raises(ExportError, match=r"should quantize .*float32.gguf, but it does not \(.*llama"):
        storage.quantize_by_llama_cpp(tmp_path / "float32.gguf", tmp_path / "model.gguf")


def test_4_bits_without_llama_cpp_are_refused(chatml_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    base = save_base(tmp_path / "base", chatml_tokenizer, "llama")
    with pytest.raises(ImportError, match="pip install llama-cpp-python"):
        export(base, tmp_path / "out", quantize="q4_k_m")
    assert not list((tmp_path / "out").rglob("*.gguf"))


def test_the_program_quantizes_where_the_library_is_missing(tmp_path, monkeypatch):
    program = tmp_path / "llama-quantize"
    program.write_text(f"#!{sys.executable}\nimport shutil, sys\nshutil.copy(sys.argv[1], sys.argv[2])\n"
                       "sys.exit(sys.argv[3] != 'Q4_K_M')\n")  # fmt: skip
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(storage, "find_spec", lambda name: None)
    storage.check_quantizer("q4_k_m")
    (tmp_path / "float32.gguf").write_text("weights")
    storage.quantize_by_llama_cpp(tmp_path / "float32.gguf", tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text() == "weights"


# what is refused


def test_other_architectures_are_refused():
    with pytest.raises(ValueError, match=r"the model is a GPT2LMHeadModel: use --to merged, and llama.cpp's"):
        find_family(hf_gpt2(0))


def test_models_of_x_transformers_are_refused(tmp_path, monkeypatch):
    from dpo_wrapper.pretrained import PRESETS

    monkeypatch.setitem(PRESETS, "tiny", {"dim": 32, "depth": 1, "heads": 1})
    decoder = save_decoder(tmp_path / "decoder")
    with pytest.raises(ValueError, match="is one of x-transformers: use --to x-transformers"):
        export(decoder, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act of a LlamaForCausalLM should be silu"),
        ("qwen3", {"attention_bias": True}, "attention_bias .* should be False"),
        ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar .* should be 32"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping .* should be a number"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "layer_types .* should be"),
        ("gemma2", {"tie_word_embeddings": False}, "head of a Gemma2ForCausalLM should be its embedding"),
        ("gemma3", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping .* should be None"),
        ("phi3", {"num_attention_heads": 2, "head_dim": 16}, "head_dim .* should be 32"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type .* should be default or linear or yarn .* but it is dynamic",
        ),
        (
            "llama-yarn",
            {"rope_parameters": MODELS["llama-yarn"][1]["rope_parameters"] | {"truncate": False}},
            "truncate of YaRN .* should be True",
        ),
    ],
)
def test_settings_that_llama_cpp_does_not_know_are_refused(name, options, message, tmp_path):
    from gguf import GGUFWriter

    config_class, defaults = MODELS[name]
    model = make_model(config_class, **(defaults | options))
    with pytest.raises(ValueError, match=message):
        family = find_family(model)
        add_hyperparameters(GGUFWriter(tmp_path / "model.gguf", "llama"), model, family)
        list(convert_tensors(model, family))
    assert not (tmp_path / "model.gguf").exists()


def test_tensors_without_a_name_in_llama_cpp_are_refused():
    model = make_known_model("qwen2")
    model.model.layers[0].self_attn.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.extra.weight has none"):
        list(convert_tensors(model, find_family(model)))
