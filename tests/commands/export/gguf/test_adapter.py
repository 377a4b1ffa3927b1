"""`--to gguf --adapter` of every family and form: it agrees, loads again, and names its command."""

import pytest
import torch

from dpo_wrapper.pretrained import load_pretrained
from helpers.exported_models import FAMILIES, LINEAR, save_base, save_lora
from helpers.exports import read_record
from helpers.gguf_files import edited_copy, export_adapter, write_base
from helpers.lora_runs import logits_of

pytest.importorskip("peft")
pytest.importorskip("gguf")

LORA = {
    "some ranks": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}},
    "some scales": {"alpha_pattern": {"v_proj": 3, "layers.0.self_attn.o_proj": 17}},
    "scale 0": {"lora_alpha": 0, "alpha_pattern": {"v_proj": 3}},
    "scales 0": {"lora_alpha": 0},
    "rank-stabilized, some ranks": {"use_rslora": True, "rank_pattern": {"k_proj": 3}},
    "one layer": {"layers_to_transform": [1], "target_modules": list(LINEAR)},
    "embeddings and head": {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]},
}


def save_family(folder, family):
    """A base that llama.cpp knows: of Gemma 3 the first layers have a window."""
    options = {"layer_types": ["sliding_attention"] * 2} if family == "gemma3_text" else {}
    return save_base(folder, family, **options)


def check_agrees(folder):
    record = read_record(folder)
    assert record["status"] == "verified"
    assert record["agreements"][0]["difference"] < 1e-5


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


def test_command_names_base_and_file(lora, base_file, tmp_path, capsys):
    assert export_adapter(lora, tmp_path) == 0
    line = f"llama-cli -m BASE.gguf --lora {tmp_path / 'gguf' / 'adapter.gguf'}"
    assert line in capsys.readouterr().out
    assert export_adapter(lora, tmp_path, base=base_file) == 0
    output = capsys.readouterr().out
    assert f"llama-cli -m '{base_file}' --lora {tmp_path}/gguf/adapter.gguf\n" in output


def drop_tensors(fields, tensors):
    for letter in "ab":
        tensors.pop(f"blk.1.ffn_down.weight.lora_{letter}")


def test_loading_refuses_other_factors(exported, tmp_path):
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edited_copy(exported / "adapter.gguf", tmp_path, drop_tensors)
    with pytest.raises(ValueError, match=r"should hold the factors that .*adapter_config.json says"):
        load_pretrained(str(tmp_path), None, 1)


def test_loaded_adapter_trains(exported):
    pretrained = load_pretrained(str(exported), None, 1)
    trained = [name for name, one in pretrained.model.named_parameters() if one.requires_grad]
    assert len(trained) == 28 and all("lora_" in name for name in trained)
    assert pretrained.tokenizer.has_chat_template
    assert torch.isfinite(logits_of(pretrained.model)).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_agrees(family, tmp_path):
    """On a base that is written for it, and on a file in 16 bits."""
    pytest.importorskip("llama_cpp")
    base = save_family(tmp_path / "base", family)
    lora = save_lora(tmp_path / "lora", base, use_rslora=True, rank_pattern={"o_proj": 2})
    assert export_adapter(lora, tmp_path) == 0
    assert (
        export_adapter(lora, tmp_path / "16", base=write_base(base, tmp_path / "base.gguf", "float16")) == 0
    )
    for folder, count in ((tmp_path, 1), (tmp_path / "16", 2)):
        _, *by_llama_cpp = read_record(folder / "gguf")["agreements"]
        assert len(by_llama_cpp) == count
        assert by_llama_cpp[0]["difference"] < (1e-3 if family.startswith("gemma") else 1e-5)


@pytest.mark.slow
def test_llama_cpp_takes_embeddings_and_head(base, tmp_path):
    pytest.importorskip("llama_cpp")
    lora = save_lora(tmp_path / "lora", base, target_modules=["embed_tokens", "lm_head", "k_proj"])
    assert export_adapter(lora, tmp_path) == 0
    _, by_llama_cpp = read_record(tmp_path / "gguf")["agreements"]
    assert by_llama_cpp["difference"] < 1e-5
