"""After which steps something is due."""

import pytest

from dpo_wrapper.training.schedule import plan_schedule
from helpers.runs import make_config


def plan(num_steps, num_trained=10**6, num_eval=10, **options):
    config = make_config("rows", "out", **({"eval_steps": None} | options))
    return plan_schedule(config, num_steps, num_trained, num_eval)


@pytest.mark.parametrize(
    "num_steps, num_trained, num_eval, expected",
    [
        (800, 12_800, 40, 100),  # eight intervals
        (42, 648, 40, 11),  # at least ten steps apart
        (14, 216, 40, 14),
        (5, 80, 10, 5),
        (200, 3200, 800, 100),  # on at most half as many examples as are trained on
        (200, 3200, 1000, 200),
        (200, 3200, 4000, 200),
        (200, 3200, 0, 25),
    ],
)
def test_a_run_is_evaluated_as_often_as_is_worth_it(num_steps, num_trained, num_eval, expected):
    assert plan(num_steps, num_trained, num_eval).eval_steps == expected
    assert plan(num_steps, num_trained, num_eval, eval_steps=3).eval_steps == 3


@pytest.mark.parametrize("num_trained, expected", [(120, 120), (10_000, 256)])
def test_no_more_train_examples_are_evaluated_than_are_trained_on(num_trained, expected):
    assert plan(30, num_trained).max_train_evaluated == expected


def test_there_are_about_twenty_lines_a_stage():
    assert [plan(num_steps).logging_steps for num_steps in (0, 1, 20, 21, 1000)] == [1, 1, 1, 2, 50]
    assert plan(1000, logging_steps=7).logging_steps == 7


@pytest.mark.parametrize("interval, due", [(4, [4, 8, 10]), (5, [5, 10]), (0, [10]), (20, [10])])
def test_something_is_due_at_its_interval_and_at_the_end(interval, due):
    schedule = plan(10)
    assert [step for step in range(11) if schedule.is_due(interval, step)] == due
    for step in range(11):
        assert schedule.count_due(interval, step) == len([later for later in due if later >= step])
