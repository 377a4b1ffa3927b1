"""Completions of policy and reference for the same prompts, side by side, while a stage runs."""

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from dpo_wrapper.data import TokenizedExample
from dpo_wrapper.data.tokens.tokenizers import load_tokenizer
from dpo_wrapper.training.monitoring import samples as samples_module
from dpo_wrapper.training.monitoring.samples import Samples
from dpo_wrapper.training.run_folder import RunFolder
from dpo_wrapper.training.stage_plan import Splits
from dpo_wrapper.training.train import train
from helpers.runs import interrupt_training, make_config

TOKENIZER = load_tokenizer("bytes")


class FakeStage:
    """A stage whose policy and reference write texts that say how often they have been asked."""

    def __init__(self, has_model, name="dpo", has_reference=True, reference_changes=False):
        self.name, self.has_reference, self.reference_changes = name, has_reference, reference_changes
        self.model, self.reference = nn.Module(), nn.Module() if has_model else None
        self.calls = {self.model: 0, self.reference: 0}
        self.is_frozen = False

    @contextmanager
    def reference_model(self):
        self.is_frozen = True
        yield self.reference
        self.is_frozen = False

    def generate(self, model, prompts, *_):
        self.calls[model] += 1
        assert self.is_frozen == (model is self.reference)
        name = "policy" if model is self.model else "reference"
        return [f"{name} {self.calls[model]}"] * len(prompts)


def make_example(prompt, chosen):
    return TokenizedExample(
        (TOKENIZER.bos_id, *TOKENIZER.encode(prompt)), (tuple(TOKENIZER.encode(chosen)), (5,))
    )


@pytest.fixture
def sample(tmp_path, monkeypatch):
    run = RunFolder(make_config(tmp_path / "rows", tmp_path / "out"))
    run.path.mkdir()
    splits = Splits([make_example("train", "x")], [make_example(f"q{k}", f"a{k}") for k in range(5)], "pairs")
    pretrained = SimpleNamespace(tokenizer=TOKENIZER, max_positions=None)

    def make(stage, count=2, first_step=0):
        monkeypatch.setattr(samples_module, "generate_completions", stage.generate)
        return Samples(run, stage, splits, pretrained, count, first_step)

    return make


def test_the_reference_is_asked_once(sample):
    stage = FakeStage(has_model=True)
    samples = sample(stage)
    assert not samples.needs_start
    samples.take(3)
    first, second = samples.take(6)
    assert stage.calls == {stage.model: 2, stage.reference: 1}
    assert first == {
        "stage": "dpo", "step": 6, "prompt": "q0", "readable_prompt": "q0", "reference": "reference 1",
        "policy": "policy 2", "chosen": "a0",
    }  # fmt: skip
    assert second["prompt"] == "q1"
    records = samples.run.read_samples()
    assert [record["step"] for record in records] == [3, 3, 6, 6] and records[2:] == [first, second]


def test_a_reference_that_changes_is_asked_again(sample):
    samples = sample(FakeStage(has_model=True, reference_changes=True))
    assert [samples.take(step)[0]["reference"] for step in (3, 6)] == ["reference 1", "reference 2"]


def test_without_a_model_the_reference_is_the_policy_before_the_first_step(sample):
    samples = sample(FakeStage(has_model=False))
    assert samples.needs_start
    assert [samples.take(step)[0]["reference"] for step in (0, 6)] == ["policy 1", "policy 1"]


def test_supervised_training_has_no_reference(sample):
    samples = sample(FakeStage(has_model=False, name="sft", has_reference=False))
    assert not samples.needs_start and samples.take(6)[0]["reference"] is None


def test_a_resumed_run_knows_the_reference_and_drops_what_comes_again(sample):
    sample(FakeStage(has_model=False, name="sft", has_reference=False)).take(9)
    samples = sample(FakeStage(has_model=False))
    for step in (0, 4, 8):
        samples.take(step)
    resumed = sample(FakeStage(has_model=False), first_step=8)
    assert resumed.take(8)[0]["reference"] == "policy 1"
    found = [(record["stage"], record["step"]) for record in resumed.run.read_samples()[::2]]
    assert found == [("sft", 9), ("dpo", 0), ("dpo", 4), ("dpo", 8)]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}, {"loss": "simpo"}])
def test_samples_change_nothing_and_resume(rows, tmp_path, capsys, options):
    options |= {"sft_epochs": 0, "epochs": 1, "max_length": 32, "sample_steps": 2, "save_steps": 3}
    whole, out = tmp_path / "whole", tmp_path / "out"
    train(make_config(rows, whole, **options))
    printed = capsys.readouterr().out
    assert printed.count("prompt  ") == 3 and printed.count("reference  ") == 3  # at 2, 4 and the end
    with interrupt_training("dpo", after_steps=4):
        train(make_config(rows, out, **options))
    train(make_config(rows, out, resume=True, **options))
    texts = [Path(folder / "samples.jsonl").read_text() for folder in (whole, out)]
    assert texts[0] == texts[1]
    records = [json.loads(line) for line in texts[0].splitlines()]
    assert [record["step"] for record in records if record["step"]] == [2, 4, 6]
    assert len({record["reference"] for record in records}) == 1
    train(make_config(rows, tmp_path / "plain", **(options | {"sample_steps": 0, "samples": 0})))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out", "plain")]
    assert weights[0] == weights[1] == weights[2]
    assert not (tmp_path / "plain" / "samples.jsonl").exists()
