"""The table at the end of a run."""

import pytest

from dpo_wrapper.evaluation.report import estimate_standard_error, format_before_and_after


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


@pytest.mark.parametrize("metrics", [{}, {"loss": 1.0}, {"rewards/accuracies": 0.5, "pairs/valid": 0.0}])
def test_without_an_accuracy_or_without_pairs_there_is_none(metrics):
    assert estimate_standard_error({"pairs/valid": 5.0} | metrics) == {}
    assert "standard error" not in format_before_and_after([{"part": "eval"} | metrics])
