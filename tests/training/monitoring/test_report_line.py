"""The lines that a run prints, and how long it says that it still takes."""

import pytest

from dpo_wrapper.training.monitoring.report_line import (
    count_examples,
    format_duration,
    format_evaluation_line,
    format_step_line,
)
from dpo_wrapper.training.monitoring.time_left import TimeLeft
from dpo_wrapper.training.schedule import Schedule

TIMES = {"unique_tokens/second": 1840.4, "padded_tokens/second": 3210.0, "memory_gb": 2.06}


def test_a_line_of_preference_training():
    metrics = {"loss": 0.5123, "rewards/accuracies": 0.78, "rewards/margins": 0.84, "kl/chosen": -3.2}
    assert format_step_line("dpo", 20, 600, metrics | TIMES, 250.4) == (
        "dpo  20/600  loss 0.5123  accuracy  78%  margin  0.840  chosen  -3.20   1,840 tokens/s (padded "
        "3,210)  2.1 GB  4:10 left"
    )


def test_a_line_without_a_reference_says_the_log_prob_itself():
    metrics = {"loss": 0.5, "rewards/accuracies": 1.0, "rewards/margins": 0.0, "logps/chosen": -41.256}
    line = format_step_line("dpo", 1, 2, metrics | TIMES, 0)
    assert "accuracy 100%  margin  0.000  log-prob of chosen -41.26  " in line


def test_a_line_of_supervised_training_has_the_perplexity():
    line = format_evaluation_line("sft", 3, 14, {"loss": 2.0}, "40 eval completions", 61.234)
    assert line == "sft  3/14  loss 2.0000  perplexity 7.389   (on 40 eval completions, 61.2 s)"
    assert "perplexity" not in format_evaluation_line("sft", 3, 14, {"loss": 900.0}, "2 documents", 0.1)


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0:00"), (59.6, "1:00"), (250, "4:10"), (7265, "2:01:05"), (90_000, "25:00:00")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_one_example_is_told_in_the_singular():
    assert count_examples(1, "eval pairs") == "1 eval pair" and count_examples(0, "lists") == "0 lists"
    assert count_examples(2000, "documents") == "2,000 documents"


def test_the_time_left_counts_what_is_still_due():
    time_left = TimeLeft(Schedule(10, logging_steps=1, eval_steps=4, save_steps=0, sample_steps=5))
    assert time_left.estimate(0) == 0.0  # nothing is known yet
    time_left.step_seconds.extend([1.0, 3.0])
    time_left.seconds |= {"eval": 10.0, "train": 100.0, "sample": 0.5}
    assert time_left.estimate(1) == 9 * 2.0 + 3 * 10.0 + 100.0 + 2 * 0.5  # eval at 4, 8, 10; samples at 5, 10
    assert time_left.estimate(8) == 2 * 2.0 + 2 * 10.0 + 100.0 + 0.5  # its line comes before its evaluation
    assert time_left.estimate(10) == 10.0 + 100.0 + 0.5
