"""The table at the end of a run."""

import pytest

from dpo_wrapper.evaluation.report import estimate_standard_errors, format_before_and_after


def record(part, **metrics):
    return {"part": part, "pairs/valid": 150.0, **metrics}


def test_the_accuracy_has_its_standard_error():
    records = [
        record("eval", **{"rewards/accuracies": 0.5, "rewards/margins": 0.0}),
        record("eval", **{"rewards/accuracies": 0.6, "rewards/margins": 0.25}),
    ]
    lines = format_before_and_after(records).splitlines()
    assert [line.split() for line in lines[2:4]] == [
        ["reward", "accuracy", "50.0%", "60.0%"],
        ["standard", "error", "4.1%", "4.0%"],  # √(0.5 · 0.5 / 150), √(0.6 · 0.4 / 150)
    ]


def test_the_share_of_exact_answers_is_one_of_prompts():
    answers = {"exact_answers": 0.1, "exact_answers/prompts": 100.0}
    assert estimate_standard_errors(answers) == {"exact_answers/standard_error": pytest.approx(0.03)}


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"loss": 1.0},
        {"rewards/accuracies": 0.5, "pairs/valid": 0.0},
        {"rewards/accuracies": 1.0},
        {"exact_answers": 0.0, "exact_answers/prompts": 9},
        {"exact_answers": 0.5},
    ],
)
def test_where_it_cannot_be_estimated_there_is_none(metrics):
    assert estimate_standard_errors({"pairs/valid": 5.0} | metrics) == {}
    assert "standard error" not in format_before_and_after([{"part": "eval"} | metrics])
