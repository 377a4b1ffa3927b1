"""Intervals of means over seeds and pairs, and what is said of them."""

import numpy as np
import pytest

from dpo_wrapper.commands.compare.intervals import CrossedBootstrap
from dpo_wrapper.commands.compare.results import METRICS, MetricResult
from dpo_wrapper.commands.compare.words import describe_differences, describe_order
from dpo_wrapper.evaluation.statistics.bootstrap import Estimate


def test_means_of_resamples_by_hand():
    """Two seeds and three pairs, of which the last two have one prompt."""
    table = np.array([[1.0, 0.0, 0.5], [0.0, np.nan, 1.0]])
    bootstrap = CrossedBootstrap(2, ["b", "a", "a"])
    bootstrap.seed_counts = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    bootstrap.prompt_counts = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])  # of a and of b
    # all once: five known values; the first seed and prompt a, twice each; the second seed and prompt b
    assert bootstrap.draw_means(table) == pytest.approx([2.5 / 5, 0.25, 0.0])


def test_what_contestants_have_in_common_cancels():
    generator = np.random.default_rng(0)
    first = generator.normal(size=(3, 40)) * 10
    bootstrap = CrossedBootstrap(3, [str(k) for k in range(40)])
    difference = bootstrap.estimate_difference(first + 0.25, first)
    assert (difference.value, *difference.bounds) == pytest.approx((0.25, 0.25, 0.25))
    assert np.ptp(bootstrap.estimate_mean(first).bounds) > 2


def test_an_interval_covers_the_mean_of_new_seeds_and_prompts():
    """Values with an effect of the seed and of the prompt, 100 times; the true mean is 0."""
    generator, covered = np.random.default_rng(1), 0
    for trial in range(100):
        seeds, prompts = generator.normal(size=(8, 1)) * 0.2, generator.normal(size=(1, 60))
        bootstrap = CrossedBootstrap(8, [str(k) for k in range(60)], seed=trial)
        low, high = bootstrap.estimate_mean(seeds + prompts + generator.normal(size=(8, 60)) * 0.3).bounds
        covered += low <= 0 <= high
    assert 90 <= covered <= 100


def test_pairs_of_one_prompt_are_one_observation():
    values = np.repeat(np.random.default_rng(2).normal(size=(1, 20)), 5, axis=1)
    names = [str(k // 5) for k in range(100)]
    together, alone = (CrossedBootstrap(1, one).estimate_mean(values) for one in (names, range(100)))
    assert np.ptp(together.bounds) > 1.8 * np.ptp(alone.bounds)


def test_what_is_always_right_is_not_certain():
    """With 20 prompts, all of them right, a rate of 83.2% still has a chance of 2.5%."""
    bootstrap = CrossedBootstrap(2, [str(k) for k in range(20)])
    right = bootstrap.estimate_mean(np.ones((2, 20)), is_share=True)
    assert (right.high, right.low**20) == (1, pytest.approx(0.025))
    assert bootstrap.estimate_mean(np.zeros((2, 20)), is_share=True).high == pytest.approx(1 - right.low)


A, B, C = Estimate(0.8, 0.7, 0.9), Estimate(0.75, 0.65, 0.85), Estimate(0.5, 0.4, 0.6)


@pytest.mark.parametrize(
    ("estimates", "sentence"),
    [
        ({"b": B, "a": A}, "In x all are a tie, for their intervals overlap: a (80%) and b (75%)."),
        ({"c": C, "a": A}, "In x the order is a (80%), c (50%): no two intervals overlap."),
        (
            {"b": B, "c": C, "a": A},
            "In x a (80%) is above c (50%); b (75%) is above c. Between a and b it is a tie.",
        ),
        (
            {"a": Estimate(0.8), "c": C},
            "In x all are a tie, for their intervals overlap: a (80%) and c (50%).",
        ),
    ],
)
def test_overlapping_intervals_are_called_a_tie(estimates, sentence):
    assert (
        describe_order("x", estimates, "{:.0%}".format).replace(" b (75%) is a tie", " b is a tie")
        == sentence
    )


def test_nothing_is_said_of_other_prompts_where_there_is_one():
    bootstrap = CrossedBootstrap(2, ["a", "a"])
    for table, is_share in ((np.array([[1.0, 2.0], [2.0, 5.0]]), False), (np.ones((2, 2)), True)):
        assert bootstrap.estimate_mean(table, is_share=is_share).bounds is None


def test_a_difference_on_the_same_pairs_is_told_beside_a_tie():
    means = {"a": Estimate(0.3, 0.1, 0.5), "b": Estimate(0.2, 0.0, 0.4), "c": Estimate(0.1, 0.0, 0.2)}
    differences = {"b": Estimate(-0.1, -0.15, -0.05), "c": Estimate(-0.2, -0.5, 0.1)}
    metric = next(one for one in METRICS if not one.is_share)
    (sentence,) = describe_differences(MetricResult(metric, {}, means, differences))
    low, high = map(metric.format, (0.05, 0.15))
    assert sentence == f"On the same pairs and seeds a is above b by {low} to {high} all the same."
    assert describe_differences(MetricResult(metric, {}, means, {name: means["a"] for name in "bc"})) == []
