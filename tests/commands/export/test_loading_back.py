"""What is exported is loaded again by `--model`, and says the same as the run."""

import pytest
import torch

from dpo_wrapper.cli import main
from dpo_wrapper.commands.evaluate.config import EvaluateConfig
from dpo_wrapper.commands.evaluate.run_evaluation import run_evaluation
from dpo_wrapper.pretrained import load_pretrained
from helpers.exports import export_to
from helpers.lora_runs import logits_of


@pytest.fixture(scope="module")
def exports(tmp_path_factory, adapter, decoder):
    """Pairs of a model and an export of it, by the format."""
    out = tmp_path_factory.mktemp("exports")
    assert export_to(out, adapter, "peft", "merged", dtype="float32") == 0
    assert export_to(out, decoder, "x-transformers") == 0
    return {"peft": (adapter, out), "merged": (adapter, out), "x-transformers": (decoder, out)}


@pytest.mark.parametrize("form", ["peft", "merged", "x-transformers"])
def test_an_export_says_what_its_model_does(form, exports, rows, llama, capsys):
    model, out = exports[form]
    folders = [str(model), str(out / form)]
    before, after = (load_pretrained(folder, None, 64) for folder in folders)
    assert torch.allclose(logits_of(after.model), logits_of(before.model), atol=1e-4)
    assert (after.adapter is None) == (form != "peft")

    figures = []
    reference = "none" if form == "x-transformers" else str(llama)
    for folder in folders:
        options = {"data": rows, "reference": reference, "resamples": 100, "cpu": True, "max_length": 64}
        figures.append(run_evaluation(EvaluateConfig(model=folder, **options))["figures"])
    values = [{k: one["value"] for k, one in each.items() if one["value"] is not None} for each in figures]
    assert len(values[0]) > 5 and values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-4)

    answers = []
    for folder in folders:
        capsys.readouterr()
        main(["chat", folder, "--prompt", "Hello", "--max-new-tokens", "6", "--cpu"])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_an_export_is_exported_again(exports, tmp_path):
    _, out = exports["peft"]
    assert export_to(tmp_path, out / "peft", "merged", dtype="float32") == 0
    first, again = ((folder / "merged" / "model.safetensors").read_bytes() for folder in (out, tmp_path))
    assert first == again
