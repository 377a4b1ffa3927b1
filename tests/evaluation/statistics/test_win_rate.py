"""Length-controlled win rates against a simulated truth."""

import numpy as np
import pytest

from dpo_wrapper.evaluation.statistics.win_rate import compare_answers, fit_logistic, sigmoid


def simulate(quality, length_weight, num=400, longer=100.0, seed=0):
    """Scores of answers of which the first are longer, by a judge who likes length."""
    rng = np.random.default_rng(seed)
    lengths, others = rng.normal(500 + longer, 100, num), rng.normal(500, 100, num)
    difference = np.tanh((lengths - others) / (lengths - others).std())
    is_won = rng.random(num) < sigmoid(quality + length_weight * difference)
    return is_won * 1.0, np.full(num, 0.5), lengths, others


@pytest.mark.slow
def test_the_length_of_answers_is_controlled_for():
    """Equal answers, of which the longer ones win: raw 70%, and 50% at equal length.

    95% of the intervals should hold the truth: of 60 trials, 4 standard errors are 11%.
    """
    trials = [compare_answers(*simulate(0.0, 2.0, num=200, seed=k), num_resamples=150) for k in range(60)]
    assert np.mean([rates.raw.value for rates in trials]) > 0.65
    controlled = [rates.length_controlled for rates in trials]
    assert np.mean([one.value for one in controlled]) == pytest.approx(0.5, abs=0.02)
    assert np.mean([one.low <= 0.5 <= one.high for one in controlled]) >= 0.84
    assert np.mean([rates.length_weight.value for rates in trials]) == pytest.approx(2.0, abs=0.15)


def test_better_answers_stay_better():
    rates = compare_answers(*simulate(1.0, 0.0, longer=0.0), num_resamples=300)
    assert rates.length_controlled.value == pytest.approx(sigmoid(np.array(1.0)), abs=0.06)
    assert rates.length_controlled.value == pytest.approx(rates.raw.value, abs=0.01)


def test_ties_and_equal_lengths():
    scores, lengths = np.array([1.0, 0.0, 2.0, 2.0]), np.full(4, 7.0)
    rates = compare_answers(scores, np.array([0.0, 1.0, 2.0, 2.0]), lengths, lengths, num_resamples=50)
    assert rates.raw.value == 0.5 and rates.length_controlled.value == pytest.approx(0.5)
    assert rates.length_weight.value == 0


def test_all_won_is_no_error():
    scores, lengths = np.ones(6), np.arange(6.0)
    rates = compare_answers(scores, np.zeros(6), lengths, lengths[::-1], num_resamples=50)
    assert rates.raw.value == 1.0 and 0.95 < rates.length_controlled.value < 1
    # six of six are won by chance in one of 64 cases: 0.025^(1/6), after Clopper and Pearson
    assert rates.raw.bounds == (pytest.approx(0.5407, abs=1e-4), 1.0)
    assert rates.length_controlled.low <= rates.raw.low and rates.length_controlled.high <= 1


def test_newtons_steps_reach_the_maximum():
    """The gradient of the penalized likelihood is zero, for each row of weights by itself."""
    rng = np.random.default_rng(0)
    wins, length = rng.random(30), rng.normal(size=30)
    weights = rng.integers(0, 3, (4, 30)).astype(float)
    fitted = fit_logistic(weights, wins, length)
    for row, (constant, slope) in zip(weights, fitted, strict=True):
        residual = row * (wins - sigmoid(constant + slope * length))
        assert residual.sum() == pytest.approx(0.01 * constant, abs=1e-8)
        assert (residual * length).sum() == pytest.approx(0.1 * slope, abs=1e-8)
