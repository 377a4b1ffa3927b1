"""Intervals: their coverage on simulated data, groups, and what has none."""

from statistics import NormalDist

import numpy as np
import pytest

from dpo_wrapper.evaluation.statistics.bootstrap import (
    Statistic,
    draw_counts,
    estimate,
    find_interval,
    mean_of,
    ratio,
)

NUM_TRIALS, NUM_RESAMPLES = 300, 400


def cover(draw, statistic, truth, seed=0):
    """The share of trials whose interval holds the truth; `draw` gives values and groups."""
    rng = np.random.default_rng(seed)
    hits = 0
    for trial in range(NUM_TRIALS):
        values, groups = draw(rng)
        options = {"num_resamples": NUM_RESAMPLES, "seed": trial}
        one = estimate({"x": statistic(values)}, groups, **options)["x"]
        hits += one.low <= truth <= one.high
    return hits / NUM_TRIALS


@pytest.mark.slow
def test_intervals_of_a_share_and_of_a_skewed_mean_cover_the_truth():
    """95% of them should: of 300 trials, 4 standard errors are 5%."""
    assert 0.9 <= cover(lambda rng: ((rng.random(60) < 0.8) * 1.0, np.arange(60)), mean_of, 0.8) <= 0.99
    draw_skewed = lambda rng: (rng.exponential(size=60), np.arange(60))  # noqa: E731
    assert 0.9 <= cover(draw_skewed, mean_of, 1.0) <= 0.99


@pytest.mark.slow
def test_rows_of_one_prompt_are_drawn_together():
    """Eight equal rows a prompt tell no more than one; drawn by rows the interval is far too narrow."""

    def draw(rng, of_rows=False):
        values = np.repeat(rng.normal(size=40), 8)
        return values, np.arange(320) if of_rows else np.repeat(np.arange(40), 8)

    assert cover(draw, mean_of, 0.0) >= 0.9
    assert cover(lambda rng: draw(rng, of_rows=True), mean_of, 0.0) < 0.7


def test_every_resample_draws_as_many_groups_and_is_the_same_for_a_seed(monkeypatch):
    counts = np.concatenate(list(draw_counts(7, 50, seed=3)))
    assert counts.shape == (50, 7) and (counts.sum(axis=1) == 7).all() and counts.std() > 0.5
    monkeypatch.setattr("dpo_wrapper.evaluation.statistics.bootstrap.CHUNK_SIZE", 40)
    assert (np.concatenate(list(draw_counts(7, 50, seed=3))) == counts).all()
    assert (np.concatenate(list(draw_counts(7, 50, seed=4))) != counts).any()


def test_values_are_those_of_all_rows_whatever_their_groups():
    values, groups = np.array([1.0, 2.0, 3.0, 6.0]), np.array([5, 5, 9, 2])
    is_chosen = np.array([1.0, 1.0, 0.0, 0.0])
    statistics = {
        "mean": mean_of(values),
        "of some": ratio(values * is_chosen, is_chosen),
        "of none": ratio(values, np.zeros(4)),
        "root": Statistic(values[:, None] ** 2, lambda sums: np.sqrt(sums[..., 0])),
    }
    found = estimate(statistics, groups, num_resamples=200)
    assert [found[name].value for name in statistics] == [3.0, 1.5, None, pytest.approx(50**0.5)]
    assert found["mean"].low < 3 < found["mean"].high and found["of none"].bounds is None
    again = estimate({"mean": statistics["mean"]}, groups, num_resamples=200)
    assert again["mean"] == found["mean"]


def test_of_one_prompt_there_is_no_interval():
    found = estimate({"mean": mean_of(np.array([1.0, 2.0]))}, np.zeros(2, np.int64))
    assert found["mean"].value == 1.5 and found["mean"].bounds is None


def test_the_interval_is_that_of_the_formulas():
    """Step by step, as DiCiccio and Efron (1996) have them in eq. 2.3, 2.8 and 6.6."""
    x = np.array([0.2, 0.5, 0.9, 1.1, 1.4, 2.2, 2.9, 3.1, 4.8, 9.0])
    counts = np.concatenate(list(draw_counts(10, 999, seed=1)))
    resampled, left_out = counts @ x / 10, (x.sum() - x) / 9
    found = find_interval(x.mean(), resampled, left_out, 0.9)
    below = (resampled < x.mean()).sum() + 0.5 * np.isclose(resampled, x.mean()).sum()
    z0 = NormalDist().inv_cdf(below / 999)
    u = left_out.mean() - left_out
    a = (u**3).sum() / (6 * (u**2).sum() ** 1.5)
    levels = [NormalDist().cdf(z0 + (z0 + z) / (1 - a * (z0 + z))) for z in (-1.6448536, 1.6448536)]
    assert a > 0.05 and (found.low, found.high) == pytest.approx(np.quantile(resampled, levels))
    percentile = np.quantile(resampled, [0.05, 0.95])
    assert found.low > percentile[0] and found.high > percentile[1]  # shifted towards the long tail
