"""What a run says of its metrics: on either side of each threshold, once, and of real runs."""

import json
import math
from functools import partial

import pytest

from dpo_wrapper.training.explanations import Explanations, explain_cuts
from dpo_wrapper.training.setup import set_up_training
from dpo_wrapper.training.train import train
from helpers.datasets import write_rows
from helpers.runs import interrupt_training, make_config

SETTINGS = {"loss": "sigmoid(beta=0.1)", "ld_alpha": 1.0, "max_grad_norm": 1.0}

STEP = {
    "loss": 0.5, "rewards/margins": 1.0, "rewards/accuracies": 0.9, "logps/chosen": -20.0,
    "logps/rejected": -30.0, "kl/chosen": -1.0,
    "length/chosen": 10.0, "length/rejected": 10.0, "grad_norm": 2.0, "lr": 1e-5,
    "pairs/valid": 16,
}  # fmt: skip
"""Metrics of which nothing is to be said."""

EVAL = {name: value for name, value in STEP.items() if name not in ("grad_norm", "lr")}


def names(file):
    return [json.loads(line)["name"] for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def observe_all(tmp_path):
    """Observes changes of the metrics above, one after another; returns the names of what is said."""

    def observe(part, *changes, num_steps=200, **settings):
        said = Explanations(tmp_path / "said.jsonl", SETTINGS | settings, num_steps)
        for step, change in enumerate(changes, start=part == "step"):
            said.observe("dpo", part, step, (STEP if part == "step" else EVAL) | change)
        return names(tmp_path / "said.jsonl")

    return observe


def test_nothing_is_said_of_a_run_that_learns(observe_all):
    assert observe_all("step", *[{}] * 200) == []
    assert observe_all("eval", *[{}] * 9) == observe_all("train", {}, {}) == []


@pytest.mark.parametrize("kl, is_said", [(-2.9, False), (-3.1, True), (3.1, False)])
def test_chosen_falls(observe_all, kl, is_said):
    assert observe_all("eval", {}, {"kl/chosen": kl}) == ["chosen falls"] * is_said


@pytest.mark.parametrize("after, is_said", [(-22.9, False), (-23.1, True)])
def test_chosen_falls_without_a_reference(tmp_path, after, is_said):
    said = Explanations(tmp_path / "said.jsonl", SETTINGS | {"loss": "simpo"}, 10)
    metrics = {name: value for name, value in EVAL.items() if name != "kl/chosen"}
    assert said.observe("dpo", "eval", 0, metrics) == []
    assert len(said.observe("dpo", "eval", 5, metrics | {"logps/chosen": after})) == is_said


@pytest.mark.parametrize("kl, is_said", [(4.9, False), (5.1, True)])
def test_far_from_the_reference(observe_all, kl, is_said):
    assert observe_all("train", {"kl/chosen": kl}) == ["far from the reference"] * is_said


@pytest.mark.parametrize("length, is_said", [(14.9, False), (15.1, True)])
def test_chosen_is_longer(observe_all, length, is_said):
    assert observe_all("eval", {"length/chosen": length}) == ["chosen is longer"] * is_said
    assert observe_all("eval", {"length/chosen": 15.1}, ld_alpha=0.5)[is_said:] == []
    assert observe_all("eval", {"length/chosen": 15.1}, loss="0.5*sft + simpo(beta=2.0)")[is_said:] == []


@pytest.mark.parametrize("length, is_said", [(39, False), (41, True)])
def test_samples_grow_longer(tmp_path, length, is_said):
    said = Explanations(tmp_path / "said.jsonl", SETTINGS, 10)
    assert (
        len(said.observe("dpo", "samples", 5, {"length/policy": length, "length/reference": 20})) == is_said
    )


@pytest.mark.parametrize(
    "accuracies, is_said",
    [
        ([0.5, *[1.0] * 6], False),  # 96 pairs
        ([0.5, *[1.0] * 7], True),
        ([0.5, 1.0, 1.0, 0.9375, *[1.0] * 50], False),
    ],
)
def test_always_right(observe_all, accuracies, is_said):
    changes = [{"rewards/accuracies": accuracy} for accuracy in accuracies]
    assert observe_all("step", *changes) == ["always right"] * is_said


@pytest.mark.parametrize("margin, is_said", [(0.011, False), (0.009, True), (-0.009, True)])
def test_nothing_is_learned(observe_all, margin, is_said):
    changes = [{"rewards/margins": margin}] * 20
    assert observe_all("step", *changes, num_steps=42) == []
    assert observe_all("step", *changes, num_steps=40) == ["nothing is learned"] * is_said


@pytest.mark.parametrize(
    "change, why",
    [
        ({"logps/rejected": -20.0}, "The two sides of each pair are the same"),
        ({"grad_norm": 0.0}, "what trains does not reach the output"),
        ({"kl/chosen": 0.09}, "The learning rate, 1.0e-05, is too small"),
        ({"kl/chosen": -0.11}, "The policy moves, but its two sides move alike"),
        ({"kl/chosen": -0.11, "rewards/accuracies": 0.9}, "The learning rate, 1.0e-05, is too small"),
    ],
)
def test_why_nothing_is_learned(tmp_path, change, why):
    said = Explanations(tmp_path / "said.jsonl", SETTINGS, 10)
    metrics = STEP | {"rewards/margins": 0.0, "rewards/accuracies": 0.5} | change
    sentences = [text for step in range(1, 11) for text in said.observe("dpo", "step", step, metrics)]
    assert len(sentences) == 1 and why in sentences[0] and sentences[0].startswith("dpo, step 10: ")


@pytest.mark.parametrize(
    "norms, is_said",
    [
        ([11.0] * 49, False),
        ([11.0] * 50, True),
        ([9.0] * 50, False),
        ([11.0] * 25 + [0.9] + [11.0] * 25, False),
    ],
)
def test_always_clipped(observe_all, norms, is_said):
    assert observe_all("step", *[{"grad_norm": norm} for norm in norms]) == ["always clipped"] * is_said


@pytest.mark.parametrize("loss, is_said", [(1.09, False), (1.11, True)])
def test_loss_rises(observe_all, loss, is_said):
    changes = [{"loss": 1.0}] * 20 + [{"loss": loss}] * 20
    assert observe_all("step", *changes) == ["loss rises"] * is_said


@pytest.mark.parametrize(
    "losses, is_said",
    [
        ([2.0, 1.0, 1.09, 1.09], False),
        ([2.0, 1.0, 1.11, 1.0, 1.11], False),
        ([2.0, 1.0, 1.11, 1.11], True),
        ([0.2, 0.1, 0.14, 0.14], False),  # much of a small loss, but few nats
    ],
)
def test_eval_loss_rises(observe_all, losses, is_said):
    assert observe_all("eval", *[{"loss": loss} for loss in losses]) == ["eval loss rises"] * is_said


def test_most_completions_are_cut():
    assert explain_cuts(49, 100, "completions", 512) == explain_cuts(0, 0, "prompts", 512) == []
    (sentence,) = explain_cuts(50, 100, "completions", 512)
    assert sentence.startswith("50% of the completions are cut at --max-length 512")


def test_what_was_said_is_not_said_again(tmp_path):
    """In the same process, in one that resumes with the log, and in another stage."""
    create = partial(Explanations, tmp_path / "said.jsonl", SETTINGS, 200)
    said, falls = create(), EVAL | {"kl/chosen": -3.5}
    (sentence,) = said.observe("dpo", "eval", 10, falls)
    assert sentence.startswith(
        "dpo, step 10: the log-prob of chosen completions has fallen by 3.5 nats, 0.35 a token"
    )
    assert said.observe("dpo", "eval", 20, falls) == create().observe("dpo", "eval", 20, falls) == []
    assert len(said.observe("sft", "eval", 20, falls)) == 1
    assert [line["step"] for line in map(json.loads, (tmp_path / "said.jsonl").read_text().splitlines())] == [
        10,
        20,
    ]


def test_a_resumed_run_knows_what_was_logged(tmp_path):
    records = [
        STEP | {"stage": "dpo", "part": "step", "step": step, "rewards/accuracies": 1.0, "grad_norm": None}
        for step in range(1, 7)
    ]
    said = Explanations(tmp_path / "said.jsonl", SETTINGS, 200, records)
    metrics = STEP | {"rewards/accuracies": 1.0, "grad_norm": math.nan}
    (step_7,) = said.observe("dpo", "step", 7, metrics) + said.observe("dpo", "step", 8, metrics)
    assert "all of the 112 pairs" in step_7 or "all of the 96 pairs" in step_7


def make_pairs(chosen, rejected, count=64):
    texts = {"prompt": "Sum of {0} and 1:", "chosen": chosen, "rejected": rejected}
    return [{name: text.format(k, k + 1, k + 2) for name, text in texts.items()} for k in range(count)]


NEARLY_EQUAL = make_pairs("The sum is {1}.", "The sum is {2}.")
LONGER = make_pairs("The sum is {1}.", "{1}.")
PLAIN_DPO = {"loss": "sigmoid(beta=0.1)"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows, options, expected",
    [
        (make_pairs("{1}!", "{1}?", 200), {}, {"always right"}),
        (NEARLY_EQUAL, {"learning_rate": 1e-9, "epochs": 4}, {"nothing is learned"}),
        (LONGER, {"max_grad_norm": 1e-3, "epochs": 7}, {"chosen is longer", "always clipped"}),
        (NEARLY_EQUAL, {"learning_rate": 1.0, "epochs": 6, **PLAIN_DPO}, {"loss rises"}),
        (
            NEARLY_EQUAL,
            {"sft_epochs": 10, "learning_rate": 1e-2, "epochs": 6, **PLAIN_DPO},
            {"chosen falls", "far from the reference", "eval loss rises"},
        ),
    ],
)
def test_runs_that_deserve_it(rows, options, expected, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", rows)
    options = {"sft_epochs": 0, "batch_size": 8, "eval_fraction": 0.1} | options
    run = train(make_config(data, tmp_path / "out", **options))
    assert expected <= set(names(run.explanations_file))
    lines = [json.loads(line) for line in run.explanations_file.read_text().splitlines()]
    output = capsys.readouterr().out
    for line in lines:
        assert output.count(f"{line['stage']}, step {line['step']}: {line['text']}") == 1


@pytest.mark.slow
def test_a_run_that_resumes_says_it_once(tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", LONGER)
    options = {"sft_epochs": 0, "save_steps": 2}
    with interrupt_training("dpo", after_steps=5):
        train(make_config(data, tmp_path / "out", **options))
    run = train(make_config(data, tmp_path / "out", resume=True, **options))
    assert names(run.explanations_file).count("chosen is longer") == 1
    assert capsys.readouterr().out.count("chosen completions are") == 1


@pytest.mark.slow
def test_a_run_whose_rows_are_cut_says_so(rows, tmp_path):
    notes = set_up_training(make_config(rows, tmp_path / "out", max_length=12)).notes
    assert any("of the prompts are cut at --max-length 12" in note for note in notes)
    notes = set_up_training(make_config(rows, tmp_path / "out", max_length=512)).notes
    assert not any("are cut" in note for note in notes)
