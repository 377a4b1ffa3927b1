"""`--to gguf --adapter`: what is written, what is refused, and that a wrong file is found out."""

import re

import numpy as np
import pytest
import torch

from dpo_wrapper.commands.export.agreement import TOLERANCES, ExportError
from dpo_wrapper.commands.export.gguf import adapter
from dpo_wrapper.commands.export.gguf.adapter import write_gguf_adapter
from dpo_wrapper.commands.export.gguf.adapter_reader import load_checked
from dpo_wrapper.commands.export.gguf.model_file import write_base_gguf
from dpo_wrapper.commands.export.lora_factors import list_lora_factors
from dpo_wrapper.commands.export.source import ExportSource
from dpo_wrapper.data.tokens.tokenizers import load_tokenizer
from dpo_wrapper.pretrained import load_pretrained
from helpers.exported_models import FAMILIES, LINEAR, make_export_config, save_base, save_lora
from helpers.exports import export_to, read_record
from helpers.gguf_files import edit_gguf, read_gguf
from helpers.lora_runs import logits_of
from helpers.tokenizers import CHATML

pytest.importorskip("peft")
gguf = pytest.importorskip("gguf")

LORA = {
    "some ranks": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}},
    "some scales": {"alpha_pattern": {"v_proj": 3, "layers.0.self_attn.o_proj": 17}},
    "scale 0": {"lora_alpha": 0, "alpha_pattern": {"v_proj": 3}},
    "scales 0": {"lora_alpha": 0},
    "rank-stabilized, some ranks": {"use_rslora": True, "rank_pattern": {"k_proj": 3}},
    "one layer": {"layers_to_transform": [1]},
    "embeddings and head": {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("gguf") / "base")


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):
    return save_lora(tmp_path_factory.mktemp("gguf") / "lora", base)


@pytest.fixture(scope="module")
def exported(lora, tmp_path_factory):
    """The folder of an export, which no test changes."""
    out = tmp_path_factory.mktemp("gguf")
    assert export_adapter(lora, out) == 0
    return out / "gguf"


@pytest.fixture(scope="module")
def base_file(base, tmp_path_factory):
    """The base in 8 bits."""
    return write_base(base, tmp_path_factory.mktemp("gguf") / "base file.gguf", "q8_0")


def export_adapter(lora, out, **options):
    return export_to(out, lora, "gguf", adapter=True, **options)


def save_family(folder, family):
    """A base that llama.cpp knows: of Gemma 3 the first layers have a window."""
    options = {"layer_types": ["sliding_attention"] * 2} if family == "gemma3_text" else {}
    return save_base(folder, family, **options)


def write_base(base, file, dtype="float32"):
    write_base_gguf(load_pretrained(str(base), None, 1).model, load_tokenizer(base), file, dtype)
    return file


def check_agrees(folder):
    record = read_record(folder)
    assert record["status"] == "verified"
    assert record["agreements"][0]["difference"] < 1e-5


def load_factors(lora):
    model = load_pretrained(str(lora), None, 1).model
    return {one.path: one for one in list_lora_factors(model, "gguf")}


def test_file_is_as_llama_cpp_reads_it(lora, exported):
    """Of the 8 rows of a head, llama.cpp has 0, 4, 1, 5, ... where transformers has 0, 1, 2, ..."""
    fields, tensors = read_gguf(exported / "adapter.gguf")
    assert fields["general.architecture"] == "llama"
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["adapter.lora.alpha"] == 10.0
    assert fields["general.base_model.0.name"] == "base"
    factors = load_factors(lora)
    assert len(factors) == 14 and len(tensors) == 28
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype("float32")}
    for path, name in (("self_attn.v_proj", "attn_v"), ("mlp.gate_proj", "ffn_gate")):
        one = factors[f"model.layers.1.{path}"]
        assert np.array_equal(tensors[f"blk.1.{name}.weight.lora_a"], one.a)
        assert np.array_equal(tensors[f"blk.1.{name}.weight.lora_b"], one.b)
    for letter, num_heads in (("q", 4), ("k", 2)):
        one = factors[f"model.layers.0.self_attn.{letter}_proj"]
        rows = [8 * head + k for head in range(num_heads) for k in (0, 4, 1, 5, 2, 6, 3, 7)]
        assert np.array_equal(tensors[f"blk.0.attn_{letter}.weight.lora_a"], one.a)
        assert np.array_equal(tensors[f"blk.0.attn_{letter}.weight.lora_b"], one.b[rows])


def test_scales_are_in_b(base, tmp_path):
    """Ranks 4 and 2 of alphas 10 and 3: alpha becomes 10, and a scale of 1.5 is 10 / 2 · 0.3."""
    options = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}
    lora = save_lora(tmp_path / "lora", base, target_modules=["q_proj", "v_proj"], **options)
    assert export_adapter(lora, tmp_path) == 0
    fields, tensors = read_gguf(tmp_path / "gguf" / "adapter.gguf")
    factors = load_factors(lora)
    assert fields["adapter.lora.alpha"] == 10.0
    v, q = (factors[f"model.layers.0.self_attn.{letter}_proj"] for letter in "vq")
    assert np.array_equal(tensors["blk.0.attn_v.weight.lora_b"], v.b)
    written = np.sort(tensors["blk.0.attn_q.weight.lora_b"], axis=0)
    np.testing.assert_allclose(written, np.sort(0.3 * q.b, axis=0), rtol=1e-6)


def test_rank_stabilized_alpha(base, tmp_path):
    """The scale 10 / √4 = 5 is alpha / 4 of 20."""
    assert export_adapter(save_lora(tmp_path / "lora", base, use_rslora=True), tmp_path) == 0
    fields, _ = read_gguf(tmp_path / "gguf" / "adapter.gguf")
    assert fields["adapter.lora.alpha"] == 20.0


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, tmp_path):
    """Read back, loaded again, and on a GGUF file of the base."""
    base = save_family(tmp_path / "base", family)
    lora = save_lora(tmp_path / "lora", base)
    assert export_adapter(lora, tmp_path) == 0
    check_agrees(tmp_path / "gguf")
    found, expected = (
        logits_of(load_pretrained(str(folder), None, 1).model) for folder in (tmp_path / "gguf", lora)
    )
    assert (found - expected).abs().max() < 1e-4
    assert export_adapter(lora, tmp_path, base=write_base(base, tmp_path / "base.gguf", "float16")) == 0
    check_agrees(tmp_path / "gguf")


@pytest.mark.parametrize("form", LORA)
def test_forms(form, base, tmp_path):
    lora = save_lora(tmp_path / "lora", base, **LORA[form])
    assert export_adapter(lora, tmp_path) == 0
    check_agrees(tmp_path / "gguf")
    found, expected = (
        logits_of(load_pretrained(str(folder), None, 1).model) for folder in (tmp_path / "gguf", lora)
    )
    assert (found - expected).abs().max() < 1e-4


def test_embeddings_are_the_other_way_round(base, tmp_path):
    lora = save_lora(tmp_path / "lora", base, target_modules=["embed_tokens", "lm_head"])
    assert export_adapter(lora, tmp_path) == 0
    _, tensors = read_gguf(tmp_path / "gguf" / "adapter.gguf")
    factors = load_factors(lora)
    assert np.array_equal(tensors["token_embd.weight.lora_a"], factors["model.embed_tokens"].a.T)
    assert np.array_equal(tensors["token_embd.weight.lora_b"], factors["model.embed_tokens"].b)
    assert np.array_equal(tensors["output.weight.lora_a"], factors["lm_head"].a)
    assert np.array_equal(tensors["output.weight.lora_b"], factors["lm_head"].b)


def test_command_names_base_and_file(lora, base_file, tmp_path, capsys):
    assert export_adapter(lora, tmp_path) == 0
    line = f"llama-cli -m BASE.gguf --lora {tmp_path / 'gguf' / 'adapter.gguf'}"
    assert line in capsys.readouterr().out
    assert export_adapter(lora, tmp_path, base=base_file) == 0
    output = capsys.readouterr().out
    assert f"llama-cli -m '{base_file}' --lora {tmp_path}/gguf/adapter.gguf\n" in output


@pytest.mark.parametrize("template", [CHATML.replace("<|im_start|>{{", "{{"), "{{ messages + 1 }}", ""])
def test_command_gives_the_template_of_the_training(template, base, lora, tmp_path, capsys):
    """The base's file has one that writes another text, or fails, or none."""
    file = write_base(base, tmp_path / "base.gguf")
    edit_gguf(file, change("tokenizer.chat_template", template))
    assert export_adapter(lora, tmp_path, base=file) == 0
    output = capsys.readouterr().out
    assert f"--jinja --chat-template-file {tmp_path}/gguf/chat_template.jinja" in output
    assert (tmp_path / "gguf" / "chat_template.jinja").read_text() == CHATML
    assert "the base's file writes dialogues otherwise" in output


def test_quantized_base_is_what_counts(lora, base_file, tmp_path):
    """What it should say is what PEFT says on the weights of the file, and not on its own base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = make_export_config(lora, tmp_path / "out", "gguf", adapter=True, base=base_file)
    source = ExportSource.load(config).answer(config)
    checks = write_gguf_adapter(source, tmp_path, config).checks
    options = {"gguf_file": base_file.name, "dtype": torch.float32}
    base = AutoModelForCausalLM.from_pretrained(base_file.parent, **options)
    model = PeftModel.from_pretrained(base, str(lora)).eval()
    for output, on_own_base in zip(checks[0].outputs, source.outputs, strict=True):
        logits = model(torch.tensor([output.ids])).logits[0, -len(output.answer_ids) :]
        np.testing.assert_allclose(output.logits, logits.detach(), atol=1e-4)
        assert np.abs(output.logits[0] - on_own_base.logits[0]).max() > 1e-2
    assert [check.tolerance for check in checks] == [TOLERANCES["float32"], TOLERANCES["q8_0"]]


# refusals


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"use_dora": True}, "has magnitudes beside them"),
        ({"bias": "lora_only"}, "trains biases"),
        ({"modules_to_save": ["lm_head"]}, "holds whole layers"),
    ],
)
def test_refuses_other_parts(options, reason, base, tmp_path):
    with pytest.raises(ValueError, match=reason):
        export_adapter(save_lora(tmp_path / "lora", base, **options), tmp_path)
    assert not (tmp_path / "gguf").exists()


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_refuses_tied_embeddings(target, tmp_path):
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    lora = save_lora(tmp_path / "lora", base, target_modules=["q_proj", target])
    with pytest.raises(
        ValueError, match=f"changes .*{target}, and the base's embeddings are its output head"
    ):
        export_adapter(lora, tmp_path)


def test_refuses_what_has_no_adapter(base, tmp_path):
    with pytest.raises(ValueError, match="needs a model with an adapter"):
        export_adapter(base, tmp_path)


def change(key, value):
    return lambda fields, tensors: fields.update({key: value})


def widen(fields, tensors):
    tensors["blk.1.ffn_up.weight"] = np.zeros((52, 32), np.float32)


@pytest.mark.parametrize(
    "edit, reason",
    [
        (change("general.architecture", "qwen2"), "the architecture in .* is qwen2 and not llama"),
        (change("llama.block_count", 3), "the number of layers in .* is 3 and not 2"),
        (change("llama.attention.head_count", 2), "the number of heads in .* is 2 and not 4"),
        (change("split.count", 2), "the number of files .* is 2 and not 1"),
        (change("general.type", "adapter"), "the type in .* is adapter and not model"),
        (widen, r"the shape of blk.1.ffn_up.weight in .* is \(52, 32\) and not \(48, 32\)"),
        (
            lambda fields, tensors: tensors.pop("blk.0.attn_v.weight"),
            "the shape of blk.0.attn_v.weight in .* is None",
        ),
    ],
)
def test_refuses_another_base(edit, reason, base, lora, tmp_path):
    file = write_base(base, tmp_path / "base.gguf")
    edit_gguf(file, edit)
    with pytest.raises(ValueError, match=f"--base should be the GGUF file of .*, but {reason}"):
        export_adapter(lora, tmp_path, base=file)
    assert not (tmp_path / "gguf").exists()


def test_refuses_what_is_no_file(lora, tmp_path):
    file = tmp_path / "base.gguf"
    with pytest.raises(ValueError, match="is not there"):
        export_adapter(lora, tmp_path, base=file)
    file.write_text("GGUF is what this is not")
    with pytest.raises(ValueError, match="should be a GGUF file, but it cannot be read"):
        export_adapter(lora, tmp_path, base=file)


# files that were tampered with


def drop_tensors(fields, tensors):
    for letter in "ab":
        tensors.pop(f"blk.1.ffn_down.weight.lora_{letter}")


def restore_query_rows(fields, tensors):
    b = tensors["blk.0.attn_q.weight.lora_b"]
    tensors["blk.0.attn_q.weight.lora_b"] = b.reshape(4, 4, 2, -1).swapaxes(1, 2).reshape(b.shape)


def round_to_float16(fields, tensors):
    tensors |= {name: tensor.astype(np.float16) for name, tensor in tensors.items()}


def nudge(fields, tensors):
    tensors["blk.0.attn_v.weight.lora_b"] *= 1.001


@pytest.mark.parametrize(
    "edit, reason",
    [
        (change("adapter.lora.alpha", 0.0), "as the adapter does"),
        (lambda fields, tensors: fields.pop("adapter.lora.alpha"), "as the adapter does"),
        (lambda fields, tensors: tensors.clear(), "changes 0"),
        (drop_tensors, "changes 13 .*mlp.down_proj"),
        (lambda fields, tensors: tensors.pop("blk.0.attn_k.weight.lora_b"), "two factors .* blk.0.attn_k"),
        (restore_query_rows, "layers.0.self_attn.q_proj as the adapter does"),
        (round_to_float16, "should be F32, but some are F16"),
        (nudge, "layers.0.self_attn.v_proj as the adapter does"),
        (change("adapter.type", "alora"), "should hold a LoRA adapter"),
        (change("general.type", "model"), "should hold a LoRA adapter"),
    ],
)
def test_finds_a_wrong_file(edit, reason, base, lora, tmp_path, monkeypatch):
    write = adapter.write_adapter_file

    def write_wrong(factors, file, *args, **options):
        write(factors, file, *args, **options)
        edit_gguf(file, edit)

    monkeypatch.setattr(adapter, "write_adapter_file", write_wrong)
    assert export_adapter(lora, tmp_path) == 1
    assert not (tmp_path / "gguf").exists()
    record = read_record(tmp_path / "gguf.differs")
    assert record["status"] == "differs" and re.search(reason, record["error"])


def test_rounded_factors_are_found(base, lora, exported, tmp_path):
    """Factors that went through 16 bits, and are float32 again."""

    def round_and_widen(fields, tensors):
        tensors |= {name: tensor.astype(np.float16).astype(np.float32) for name, tensor in tensors.items()}

    (tmp_path / "adapter.gguf").write_bytes((exported / "adapter.gguf").read_bytes())
    edit_gguf(tmp_path / "adapter.gguf", round_and_widen)
    model = load_pretrained(str(base), None, 1).model
    with pytest.raises(ExportError, match="as the adapter does"):
        load_checked(tmp_path, model, list(load_factors(lora).values()))


# loading back


def test_loading_refuses_other_factors(exported, tmp_path):
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_gguf(tmp_path / "adapter.gguf", drop_tensors)
    with pytest.raises(ValueError, match=r"should hold the factors that .*adapter_config.json says"):
        load_pretrained(str(tmp_path), None, 1)


def test_loaded_adapter_trains(exported):
    pretrained = load_pretrained(str(exported), None, 1)
    trained = [name for name, one in pretrained.model.named_parameters() if one.requires_grad]
    assert len(trained) == 28 and all("lora_" in name for name in trained)
    assert pretrained.tokenizer.has_chat_template
    assert torch.isfinite(logits_of(pretrained.model)).all()
