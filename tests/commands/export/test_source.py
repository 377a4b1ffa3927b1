"""What can be exported, and what cannot."""

import json

import pytest
import torch

from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.commands.export.source import ExportSource
from dpo_wrapper.data import ByteTokenizer
from dpo_wrapper.pretrained import PretrainedModel, load_pretrained, save_pretrained
from dpo_wrapper.training.train import train
from helpers.exports import export_to, save_trained_adapter
from helpers.lora_runs import logits_of, make_lora_config, save_llama
from helpers.models import hf_gpt2
from helpers.runs import QUICK


def make_config(model, out, **options):
    return ExportConfig(**({"model": str(model), "to": ("merged",), "out": out} | options))


def test_a_new_model_has_nothing_to_export(tmp_path):
    with pytest.raises(ValueError, match=r"^the model should be trained, but tiny stands for a new one"):
        export_to(tmp_path, "tiny", "merged")


def test_the_base_of_an_adapter_should_be_there(adapter, tmp_path):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter").mkdir()
    gone = config | {"base_model_name_or_path": str(tmp_path / "gone")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(gone))
    with pytest.raises(ValueError, match=f"should be in {tmp_path / 'gone'}, but there is nothing: "):
        export_to(tmp_path / "out", tmp_path / "adapter", "merged")
    assert not (tmp_path / "out").exists()


def test_a_quantized_base_is_refused(llama, tmp_path):
    base = tmp_path / "quantized"
    base.mkdir()
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="name the model as it was before it was quantised"):
        export_to(tmp_path / "out", base, "merged")


def test_weights_that_were_quantized_are_refused_where_they_can_be_computed(llama, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from dpo_wrapper.commands.export import source

    model = SimpleNamespace(config=SimpleNamespace(quantization_config={"quant_method": "fp8"}))
    quantized = PretrainedModel(model, ByteTokenizer(), "bytes", None)
    monkeypatch.setattr(source, "load_named", lambda *args, **options: quantized)
    with pytest.raises(ValueError, match=r"but its base is a quantized checkpoint: train on the model that"):
        export_to(tmp_path / "out", llama, "merged")


def test_the_answers_fit_into_a_table_of_positions(tmp_path):
    model = hf_gpt2(0)  # of 24 positions
    model.resize_token_embeddings(263, mean_resizing=False)
    save_pretrained(PretrainedModel(model, ByteTokenizer(), "bytes", None), model, tmp_path / "gpt2")
    prompt = ("A prompt of more than 24 characters",)
    assert export_to(tmp_path / "out", tmp_path / "gpt2", "merged", prompts=prompt, num_tokens=20) == 0
    with pytest.raises(
        ValueError, match=r"^--num-tokens should be below the 24 positions of .*, but it is 24"
    ):
        export_to(tmp_path / "out", tmp_path / "gpt2", "merged", num_tokens=24)


def test_prompts_are_written_as_the_run_had_them(llama, tmp_path):
    folder = tmp_path / "run"
    pretrained = load_pretrained(str(llama), None, 64)
    save_pretrained(pretrained, pretrained.model, folder)
    for choice, is_chat in (("auto", False), ("always", True), ("never", False)):
        run = {"status": "finished", "settings": {"as_chat": choice}}
        (folder / "run.json").write_text(json.dumps(run))
        config = make_config(folder, tmp_path / "out", prompts=("Hi",), num_tokens=2)
        source = ExportSource.load(config).answer(config)
        assert source.is_chat is is_chat
        roles = ByteTokenizer.role_ids
        expected = [256, roles["user"], *b"Hi", roles["assistant"]] if is_chat else [256, *b"Hi"]
        (output,) = source.outputs
        assert list(output.prompt_ids) == expected and output.logits.shape == (2, 300)


def test_an_adapter_that_was_trained_in_4_bits_goes_into_the_base_before(adapter, tmp_path, capsys):
    run = {"status": "finished", "settings": {"load_in_4bit": True}}
    folder = tmp_path / "run"
    folder.mkdir()
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "run.json").write_text(json.dumps(run))
    assert export_to(tmp_path / "out", folder, "merged", dtype="float32") == 0
    expected = "the adapter was trained on its base in 4 bits; it is exported for the base before that\n"
    assert capsys.readouterr().out.startswith(expected)
    merged, model = (load_pretrained(str(one), None, 64).model for one in (tmp_path / "out/merged", adapter))
    assert torch.allclose(logits_of(merged), logits_of(model), atol=1e-4)


@pytest.mark.slow
def test_the_model_after_supervised_training_is_exported(rows, tmp_path):
    base = save_llama(tmp_path / "base")
    options = QUICK | {"sft_epochs": 1, "lora": False}
    train(make_lora_config(rows, tmp_path / "run", base, **options))
    for name in ("run", "run/sft"):
        assert export_to(tmp_path / "out" / name, tmp_path / name, "merged", dtype="float32") == 0
        merged = load_pretrained(str(tmp_path / "out" / name / "merged"), None, 64).model
        expected = load_pretrained(str(tmp_path / name), None, 64).model
        assert torch.equal(logits_of(merged), logits_of(expected))
    train(make_lora_config(rows, tmp_path / "second", tmp_path / "out/run/merged", **QUICK))
    assert export_to(tmp_path / "out" / "second", tmp_path / "second", "peft", "merged") == 0


def test_an_adapter_of_another_kind_is_merged(llama, tmp_path):
    import peft

    from dpo_wrapper.commands.export.lora_factors import list_lora_factors

    adapter = save_trained_adapter(llama, tmp_path / "adapter", use_dora=True)
    model = load_pretrained(str(adapter), None, 64).model
    assert isinstance(model, peft.PeftModel)
    with pytest.raises(ValueError, match=r"but the adapter has magnitudes beside them \(DoRA\): use --to me"):
        list_lora_factors(model, "mlx")
