"""Intervals of means over seeds and pairs, and what is said of them."""

import numpy as np
import pytest

from dpo_wrapper.commands.compare.intervals import CrossedBootstrap, expand_tail
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


def test_contestants_that_are_right_on_the_same_pairs_are_not_equal_for_certain():
    """With 20 prompts, of which none tells the two apart, 16.8% still may, with a chance of 2.5%."""
    bootstrap = CrossedBootstrap(2, [str(k) for k in range(20)])
    right, wrong = np.ones((2, 20)), np.zeros((2, 20))
    some = np.arange(40).reshape(2, 20) % 3 / 2
    limit = 1 - 0.025 ** (1 / 20)
    for table in (right, some):
        equal = bootstrap.estimate_difference(table, table, is_share=True)
        assert (equal.value, *equal.bounds) == pytest.approx((0, -limit, limit))
    opposite = bootstrap.estimate_difference(wrong, right, is_share=True)
    assert (opposite.value, *opposite.bounds) == pytest.approx((-1, -1, -1 + 2 * limit))
    ties = bootstrap.estimate_mean(0.5 * right, is_share=True)
    assert (ties.value, *ties.bounds) == pytest.approx((0.5, 0.5 - limit / 2, 0.5 + limit / 2))


@pytest.mark.parametrize("num_prompts", [2, 5, 6])
def test_draws_from_fewer_than_six_prompts_have_no_interval(num_prompts):
    """Means that seem apart, and a difference that is negative in all draws."""
    bootstrap = CrossedBootstrap(1, [str(k) for k in range(num_prompts)])
    high, low = np.linspace(1, 1.1, num_prompts)[None], np.linspace(0, 0.2, num_prompts)[None]
    means = {name: bootstrap.estimate_mean(table) for name, table in (("high", high), ("low", low))}
    difference = bootstrap.estimate_difference(low, high)
    sentence = describe_order("x", means, "{:.2f}".format)
    if num_prompts < 6:
        assert all(one.bounds is None for one in (*means.values(), difference))
        few = "In x no order can be told, for fewer than 6 prompts allow no interval: "
        assert sentence == f"{few}high (1.05) and low (0.10)."
    else:
        assert difference.high < 0 and "the order is high" in sentence


def test_an_interval_of_few_prompts_is_as_wide_as_students():
    """Of eight values, normal percentiles cover 87% of means and these 93%."""
    assert expand_tail(0.025, 8) == pytest.approx(0.00575, abs=2e-4)  # Φ(-2.3646 √(8/7))
    assert expand_tail(0.025, 10**6) == pytest.approx(0.025, rel=1e-4)
    values, bootstrap = np.random.default_rng(3), CrossedBootstrap(1, [str(k) for k in range(8)])
    intervals = [bootstrap.estimate_mean(values.normal(size=(1, 8))) for _ in range(400)]
    assert sum(one.low <= 0 <= one.high for one in intervals) >= 0.91 * 400


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
            "In x no order can be told, for fewer than 6 prompts allow no interval: a (80%) and c (50%).",
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
