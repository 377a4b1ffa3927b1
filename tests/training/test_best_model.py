"""Early stopping, and the weights of the best evaluation."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from dpo_wrapper.training.best_model import BestEvaluation
from dpo_wrapper.training.evaluator import Evaluator
from dpo_wrapper.training.options.output import OutputOptions
from dpo_wrapper.training.run_folder import RunFolder
from dpo_wrapper.training.setup import set_up_training
from dpo_wrapper.training.stages import DPOStage
from dpo_wrapper.training.stopping import TrainingError
from dpo_wrapper.training.train import train
from helpers.datasets import write_rows
from helpers.runs import interrupt_training, make_config, read_metrics

LOSSES = [3.0, 2.0, 1.0, 1.5, 1.25, 2.5, 3.0]
"""Of the evaluations after steps 0, 2, 4, ... of preference training: the one after step 4 is the best."""


def test_the_best_evaluation_and_how_many_followed():
    best = BestEvaluation("loss", "dpo")
    is_best = [best.observe(step, {"loss": loss}) for step, loss in enumerate([2.0, math.nan, 1.0, 1.0, 1.5])]
    assert is_best == [True, False, True, False, False]
    assert (best.step, best.value, best.num_worse) == (2, 1.0, 2)
    assert str(best) == "step 2, with the best eval loss (1)"


@pytest.mark.parametrize(
    "metric, first, second",
    [("rewards/accuracies", 0.5, 0.6), ("max:length/chosen", 1, 2), ("min:kl/chosen", 2, 1)],
)
def test_directions_of_metrics(metric, first, second):
    name = metric.rpartition(":")[2]
    assert BestEvaluation(metric, "dpo").observe(0, {name: first})
    for values, is_best in (((first, second), True), ((second, first), False)):
        best = BestEvaluation(metric, "dpo")
        assert [best.observe(step, {name: value}) for step, value in enumerate(values)] == [True, is_best]


def test_what_an_earlier_run_has_logged_counts():
    records = [
        {"stage": "sft", "part": "eval", "step": 0, "loss": 0.1},
        {"stage": "dpo", "part": "eval", "step": 0, "loss": 2.0},
        {"stage": "dpo", "part": "step", "step": 1, "loss": 0.1},
        {"stage": "dpo", "part": "eval", "step": 2, "loss": None},
    ]
    best = BestEvaluation("loss", "dpo", records)
    assert (best.step, best.value, best.num_worse) == (0, 2.0, 1)


def test_supervised_training_is_judged_by_its_loss():
    assert BestEvaluation("rewards/accuracies", "sft").observe(0, {"loss": 1.0})
    with pytest.raises(
        TrainingError, match="but rewards/accuracies is none: begin a new run with one of loss"
    ):
        BestEvaluation("rewards/accuracies", "dpo").observe(0, {"loss": 1.0})


@pytest.mark.parametrize(
    "options, match",
    [
        ({"best_metric": "length/chosen", "keep_best": True}, "but it is length/chosen: say which is better"),
        ({"best_metric": "most:loss", "keep_best": True}, "but it is most:loss: say which is better"),
        ({"best_metric": "rewards/margins"}, "rewards/margins alone: add one of them"),
        ({"early_stopping_patience": 0}, "--early-stopping-patience should be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        OutputOptions(**options)


def test_evaluations_are_compared_only_where_there_are_any(rows, tmp_path):
    pairs = [json.loads(line) for line in rows.read_text().splitlines()]
    keys = ("prompt", "chosen", "rejected")
    data = write_rows(tmp_path / "rows.jsonl", [{key: pair[key] for key in keys} for pair in pairs])
    with pytest.raises(ValueError, match="--keep-best needs completions to evaluate on, but there are none"):
        set_up_training(make_config(data, tmp_path / "out", keep_best=True, eval_fraction=0.0))


@pytest.fixture
def policies(monkeypatch):
    """Gives preference training its eval losses; holds the policies that were evaluated, by their steps."""
    evaluate, evaluate_stage, policies = Evaluator.evaluate, DPOStage.evaluate, {}
    last_step = 0

    def note_step(self, step, name, examples, needs_answers=False):
        nonlocal last_step
        last_step = step
        state = self.stage.dpo.policy_model.state_dict()
        policies.setdefault(step, {name: value.clone() for name, value in state.items()})
        return evaluate(self, step, name, examples, needs_answers)

    def evaluate_as_given(self, *args):
        return evaluate_stage(self, *args) | {"loss": LOSSES[last_step // 2]}

    monkeypatch.setattr(Evaluator, "evaluate", note_step)
    monkeypatch.setattr(DPOStage, "evaluate", evaluate_as_given)
    return policies


OPTIONS = {"sft_epochs": 0, "eval_steps": 2, "early_stopping_patience": 3, "keep_best": True, "save_steps": 5}


def is_policy(file, policy):
    """Whether a file holds the weights of a policy; write_state numbers what it writes."""
    saved = sorted(load_file(file).values(), key=lambda t: t.shape)
    kept = sorted(policy.values(), key=lambda t: t.shape)
    return all(any(torch.equal(one, other) for other in kept) for one in saved) and len(saved) > 3


@pytest.mark.slow
@pytest.mark.parametrize("after_steps", [None, 4, 6])
def test_a_stage_ends_early_with_the_best_weights(rows, tmp_path, capsys, policies, after_steps):
    """Interrupted before the best evaluation, and after the first checkpoint that follows it."""
    out = tmp_path / "out"
    if after_steps is not None:
        with interrupt_training("dpo", after_steps=after_steps):
            train(make_config(rows, out, **OPTIONS))
    train(make_config(rows, out, resume=after_steps is not None, **OPTIONS))
    records = read_metrics(out)
    assert max(record["step"] for record in records if record["part"] == "step") == 10
    assert [(record["part"], record["step"]) for record in records[-3:]] == [
        ("eval", 10),  # as it was
        ("eval", 10),  # with the best weights
        ("train", 10),
    ]
    log_probs = {
        record["step"]: record["logps/chosen"] for record in records[:-2] if record["part"] == "eval"
    }
    assert records[-2]["logps/chosen"] == log_probs[4] != log_probs[10]
    assert is_policy(out / "model.safetensors", policies[4])
    assert not is_policy(out / "model.safetensors", policies[10])
    output = capsys.readouterr().out
    assert "dpo stops after step 10 of 12: 3 evaluations were no better than step 4, with the best" in output
    assert "dpo ends with the weights after step 4" in output
    assert not list(out.glob("best*"))


@pytest.mark.slow
def test_a_checkpoint_holds_the_best_weights_of_its_time(rows, tmp_path, policies):
    """The run is interrupted after a better evaluation, which it forgets when it resumes."""
    options = OPTIONS | {"save_steps": 3}
    with interrupt_training("dpo", after_steps=4):
        train(make_config(rows, tmp_path / "out", **options))
    run = RunFolder(make_config(rows, tmp_path / "out", resume=True, **options))
    assert is_policy(run.best_file, policies[4])
    run.check(resume=True)
    run.open()
    assert is_policy(run.best_file, policies[2]) and not is_policy(run.best_file, policies[4])
