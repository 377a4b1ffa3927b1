"""Figures of pairs against numbers that are worked out by hand."""

import math

import numpy as np
import pytest

from dpo_wrapper.data import TokenizedExample
from dpo_wrapper.evaluation.completion_scores import CompletionScores
from dpo_wrapper.evaluation.statistics.bootstrap import estimate
from dpo_wrapper.evaluation.statistics.calibration import calibration_statistics, confidence_bins, length_bins
from dpo_wrapper.evaluation.statistics.figures import ACCURACY, SUBSET_MEAN, Resampling, estimate_figures
from dpo_wrapper.evaluation.statistics.pair_scores import (
    PairScores,
    length_statistics,
    log_prob_statistics,
    reward_statistics,
)


def side(policy, reference, length, reward, rounding=1e-6):
    arrays = [np.array(values, float) for values in (policy, reference)]
    zeros = np.zeros(len(policy))
    return CompletionScores(*arrays, np.array(length), np.array(reward, float), zeros + rounding, zeros)


# four pairs; rewards are a tenth of the log-ratios; of the third both are equal
CHOSEN = side([-2, -4, -6, -8], [-3, -3, -5, -12], [2, 4, 3, 1], [0.1, -0.1, -0.1, 0.4])
REJECTED = side([-5, -5, -6, -9], [-3, -7, -5, -8], [1, 4, 5, 2], [-0.2, 0.2, -0.1, -0.1])
PAIRS = PairScores(CHOSEN, REJECTED)


def values(statistics, groups=4):
    return {
        name: one.value for name, one in estimate(statistics, np.arange(groups), num_resamples=100).items()
    }


def test_rewards_and_accuracy():
    assert PAIRS.is_right.tolist() == [1, 0, 0.5, 1]
    assert PAIRS.margin == pytest.approx([0.3, -0.3, 0, 0.5])
    found = values(reward_statistics(PAIRS))
    assert found == pytest.approx(
        {
            "rewards/accuracies": 0.625,
            "rewards/margins": 0.125,
            "rewards/chosen": 0.075,
            "rewards/rejected": -0.05,
        }
    )


def test_log_probs_their_change_and_perplexity():
    found = values(log_prob_statistics(PAIRS))
    assert found["logps/chosen"] == -5 and found["logps/ref_chosen"] == -23 / 4
    assert found["logratios/chosen"] == (1 - 1 - 1 + 4) / 4
    assert found["logratios/rejected"] == (-2 + 2 - 1 - 1) / 4
    assert found["logratios/chosen_per_token"] == pytest.approx(3 / 10)
    assert found["perplexity/chosen"] == pytest.approx(math.exp(20 / 10))
    assert found["perplexity/ref_rejected"] == pytest.approx(math.exp(23 / 12))
    assert (found["length/chosen"], found["length/rejected"]) == (2.5, 3)


def test_is_it_only_length():
    """Chosen is longer in the first pair, shorter in the last two, and equal in the second."""
    found = values(length_statistics(PAIRS))
    assert found["length/longer_wins"] == (1 + 0.5) / 4 and found["length/shorter_wins"] == (2 + 0.5) / 4
    assert found["accuracy/chosen_longer"] == 1 and found["accuracy/chosen_shorter"] == 1.5 / 2
    assert found["accuracy/lengths_balanced"] == 0.875


def test_rewards_that_know_length_alone_are_right_in_half_of_balanced_pairs():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 50, (2, 400))
    lengths[0] += 10  # chosen is longer in most pairs
    sides = [side(-one, -one, one, one / 100) for one in lengths]
    found = values(length_statistics(PairScores(*sides)) | reward_statistics(PairScores(*sides)), 400)
    assert found["rewards/accuracies"] > 0.7 and found["accuracy/lengths_balanced"] == 0.5


def test_length_bins_hold_every_pair_once():
    bins = length_bins(np.array([-9, -3, -3, -1, 0, 0, 2, 5, 5]))
    spans = [(one.low, one.high, one.count) for one in bins]
    assert spans == [(-9, -3, 3), (-2, -1, 1), (0, 0, 2), (2, 5, 3)]
    assert sum(one.is_inside for one in bins).tolist() == [1] * 9
    assert [(one.low, one.high, one.count) for one in length_bins(np.array([4]))] == [(4, 4, 1)]


def logit(p):
    return math.log(p / (1 - p))


def test_calibration():
    """Confidences 0.55, 0.65, 0.95 and 0.95 in the first, second and last of five bins."""
    margin = np.array([logit(0.55), -logit(0.65), logit(0.95), -logit(0.95)])
    is_right = np.array([1.0, 0.0, 1.0, 0.0])
    found = values(calibration_statistics(margin, is_right))
    assert found["calibration/error"] == pytest.approx((0.45 + 0.65 + abs(0.05 - 0.95)) / 4)
    assert found["calibration/brier"] == pytest.approx((0.45**2 + 0.65**2 + 0.05**2 + 0.95**2) / 4)
    expected = -(math.log(0.55) + math.log(0.35) + math.log(0.95) + math.log(0.05)) / 4
    assert found["calibration/log_loss"] == pytest.approx(expected)
    assert [one.count for one in confidence_bins(margin)] == [1, 1, 0, 0, 2]


def test_a_calibrated_reward_has_no_error():
    rng = np.random.default_rng(0)
    margin = rng.normal(size=20000)
    margin = np.where(rng.random(20000) < 1 / (1 + np.exp(-margin)), margin, -margin)  # seen from the winner
    found = values(calibration_statistics(margin, (margin > 0) * 1.0), 20000)
    assert found["calibration/error"] < 0.02


def test_every_figure_has_an_interval_and_subsets_have_their_own():
    resampling = Resampling(np.array([0, 1, 2, 2]), 200)
    content = estimate_figures(PAIRS, ["a", "a", "b", "b"], resampling)
    assert (content["pairs"], content["prompts"]) == (4, 3)
    assert {name: part["figures"][ACCURACY]["value"] for name, part in content["subsets"].items()} == {
        "a": 0.5,
        "b": 0.75,
    }
    assert content["figures"][SUBSET_MEAN]["value"] == 0.625
    for name in (ACCURACY, "rewards/margins", "logps/chosen", "perplexity/chosen"):
        figure = content["figures"][name]
        assert figure["low"] < figure["value"] < figure["high"], name
    assert content["subsets"]["b"]["prompts"] == 1
    assert content["subsets"]["b"]["figures"]["rewards/margins"]["low"] is None
    assert [one["pairs"] for one in content["length_bins"]] == [1, 1, 1, 1]
    assert sum(one["pairs"] for one in content["reliability"]) == 4
    assert "calibration/error" in content["figures"]
    content = estimate_figures(PAIRS, [None] * 4, resampling, has_probability=False)
    assert "subsets" not in content and "reliability" not in content
    assert not any(name.startswith("calibration") for name in content["figures"])


def test_pairs_that_are_all_right_are_not_certain_to_be_right():
    """An exact interval: with 20 of 20 right, a rate of 83.2% still has a chance of 2.5%."""
    ones = side([-1] * 20, [-2] * 20, [3] * 20, [0.1] * 20)
    others = side([-1] * 20, [-2] * 20, [3] * 20, [0.0] * 20)
    figures = estimate_figures(PairScores(ones, others), [None] * 20, Resampling(np.arange(20), 100))[
        "figures"
    ]
    accuracy = figures[ACCURACY]
    assert accuracy["high"] == 1 and accuracy["low"] ** 20 == pytest.approx(0.025)
    figures = estimate_figures(PairScores(others, ones), [None] * 20, Resampling(np.arange(20), 100))[
        "figures"
    ]
    assert figures[ACCURACY]["high"] == pytest.approx(1 - accuracy["low"])


def test_one_pair_of_a_side_does_not_make_the_balanced_accuracy_certain():
    """Right in the only pair whose chosen answer is longer, and in 20 whose chosen one is shorter."""
    ones = side([-1] * 21, [-2] * 21, [5, *[2] * 20], [0.1] * 21)
    others = side([-1] * 21, [-2] * 21, [3] * 21, [0.0] * 21)
    content = estimate_figures(PairScores(ones, others), ["a"] * 21, Resampling(np.arange(21), 100))
    for figures in (content["figures"], content["subsets"]["a"]["figures"]):
        balanced = figures["accuracy/lengths_balanced"]
        assert balanced["value"] == balanced["high"] == 1
        assert balanced["low"] == pytest.approx((0.025 + 0.025 ** (1 / 20)) / 2) and balanced["low"] < 0.5


def test_lines_of_pairs():
    examples = [TokenizedExample((1,), ((2,), (3,)), source=f"line {k}") for k in range(4)]
    lines = PAIRS.as_records(examples, np.array([-1, 5, 5, 6]), ["a", None, None, None])
    assert [line["prompt"] for line in lines] == ["f" * 16, *(f"{k:016x}" for k in (5, 5, 6))]
    assert lines[0] == {
        "source": "line 0",
        "prompt": "f" * 16,
        "subset": "a",
        "rewards/chosen": 0.1,
        "logps/chosen": -2.0,
        "logps/ref_chosen": -3.0,
        "length/chosen": 2,
        "rewards/rejected": -0.2,
        "logps/rejected": -5.0,
        "logps/ref_rejected": -3.0,
        "length/rejected": 1,
        "rewards/margins": pytest.approx(0.3),
        "rewards/accuracies": 1.0,
    }
    assert "subset" not in lines[1] and lines[2]["rewards/accuracies"] == 0.5
