"""`--to peft`: the adapter as PEFT reads it, on the base that it names."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dpo_wrapper.commands.export import peft_folder
from dpo_wrapper.pretrained import load_pretrained, save_pretrained
from dpo_wrapper.pretrained.adapter import merge_adapter
from dpo_wrapper.training.train import train
from helpers.exports import export_to, flip_lowest_bit, save_trained_adapter
from helpers.lora_runs import logits_of, make_lora_config
from helpers.runs import QUICK


def test_the_adapter_is_as_it_was_trained(llama, adapter, tmp_path, capsys):
    assert export_to(tmp_path, adapter, "peft") == 0
    written = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    trained = load_file(adapter / "adapter_model.safetensors")
    assert written.keys() == trained.keys()
    assert all(torch.equal(written[name], trained[name]) for name in trained)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(llama) and config["inference_mode"]
    assert f'from_pretrained("{llama}"), "{tmp_path / "peft"}")' in capsys.readouterr().out


def test_a_tampered_bit_is_found_out(adapter, tmp_path, monkeypatch, capsys):
    def save_and_tamper(pretrained, model, folder):
        save_pretrained(pretrained, model, folder)
        flip_lowest_bit(folder)

    monkeypatch.setattr(peft_folder, "save_pretrained", save_and_tamper)
    assert export_to(tmp_path, adapter, "peft") == 1
    assert "layers.0.self_attn.q_proj.lora_A.default.weight): do not use it" in capsys.readouterr().out


def test_an_adapter_on_another_one_is_merged_and_not_exported_by_itself(adapter, tmp_path):
    second = save_trained_adapter(adapter_as_base(adapter, tmp_path), tmp_path / "second")
    config_file = second / "adapter_config.json"
    config = json.loads(config_file.read_text()) | {"base_model_name_or_path": str(adapter)}
    config_file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"stands on the base model .*, {adapter} merged into it.: use --to"):
        export_to(tmp_path / "out", second, "peft")
    assert export_to(tmp_path / "out", second, "merged", dtype="float32") == 0
    merged, model = (
        load_pretrained(str(folder), None, 64).model for folder in (tmp_path / "out/merged", second)
    )
    assert torch.allclose(logits_of(merged), logits_of(model), atol=1e-4)


def adapter_as_base(adapter, folder):
    """A model with an adapter, which is merged into it."""
    whole = replace(merge_adapter(load_pretrained(str(adapter), None, 64)), adapter=None)
    save_pretrained(whole, whole.model, folder / "whole")
    return folder / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_began_with_a_part_of_the_base_is_exported(init, rows, llama, tmp_path):
    train(make_lora_config(rows, tmp_path / "run", llama, **QUICK, lora_init=init, lora_r=4))
    assert export_to(tmp_path / "out", tmp_path / "run", "peft", "merged", dtype="float32") == 0
    expected = logits_of(load_pretrained(str(tmp_path / "run"), None, 64).model)
    assert not torch.allclose(expected, logits_of(load_pretrained(str(llama), None, 64).model), atol=1e-3)
    for name in ("peft", "merged"):
        exported = load_pretrained(str(tmp_path / "out" / name), None, 64).model
        assert torch.allclose(logits_of(exported), expected, atol=1e-4)
