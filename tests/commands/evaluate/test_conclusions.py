"""What is said of figures, and how they are shown."""

import pytest

from dpo_wrapper.commands.evaluate.conclusions import draw_conclusions
from dpo_wrapper.commands.evaluate.evaluation_table import format_evaluation


def figure(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def make_content(accuracy, balanced=(0.5, 0.4, 0.6), longer=0.5, **others):
    figures = {
        "rewards/accuracies": figure(*accuracy),
        "accuracy/lengths_balanced": figure(*balanced),
        "length/longer_wins": figure(longer),
    }
    bins = [{"low": low, "high": low, "pairs": 20} for low in (-3, 4)]
    return {"figures": figures, "pairs": 40, "length_bins": bins} | others


@pytest.mark.parametrize(
    ("accuracy", "said"),
    [
        ((0.6, 0.45, 0.75), "60.0% (45.0% to 75.0%), may be that of a coin: these 40 pairs do not show"),
        (
            (0.7, 0.55, 0.8),
            "above that of a coin: the model prefers the chosen answers more than the",
        ),
        ((0.3, 0.2, 0.45), "below that of a coin: the model prefers the rejected answers more than the ref"),
        ((0.5, None, None), "All pairs are of one prompt"),
        ((0.5, 0.5, 0.5), "Every pair is a tie within rounding"),
    ],
)
def test_an_accuracy_is_told_from_a_coin_or_not(accuracy, said):
    first = draw_conclusions(make_content(accuracy), True)[0]
    assert said in first
    assert "reference" not in draw_conclusions(make_content(accuracy), False)[0]


def test_length_alone_is_named_where_it_may_explain_the_accuracy():
    above = (0.7, 0.6, 0.8)
    _, explained = draw_conclusions(make_content(above, (0.5, 0.4, 0.6), 0.8), True)
    assert "Always taking the longer answer would be right in 80.0%" in explained
    assert explained.endswith("may be that of a coin: it may be length alone.")
    _, more = draw_conclusions(make_content(above, (0.65, 0.55, 0.7), 0.4), True)
    assert "taking the shorter answer would be right in 60.0%" in more and "not length alone" in more
    few = [{"low": low, "high": low, "pairs": pairs} for low, pairs in ((-3, 80), (0, 19), (4, 1))]
    _, unknown = draw_conclusions(make_content(above, (0.5, 0.4, 0.6), 0.2, length_bins=few), True)
    assert "the chosen answer is longer in 1 of 81 pairs of unlike lengths, too few to tell" in unknown
    assert len(draw_conclusions(make_content((0.5, 0.4, 0.6)), True)) == 1
    assert len(draw_conclusions(make_content(above, (None,)), True)) == 1


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        ((0.5, 0.4, 0.6), "prefers neither the model's answers nor the reference's answers: 50.0%"),
        ((0.7, 0.6, 0.8), "prefers the model's answers to the reference's answers: the model wins 70.0%"),
        ((0.3, 0.2, 0.4), "prefers the reference's answers to the model's answers: the model wins 30.0%"),
        ((1.0, None, None), "One prompt is answered"),
    ],
)
def test_a_win_rate_is_told_from_a_tie_or_not(rate, said):
    answers = {"against": "reference", "win_rate": {"length_controlled": figure(*rate)}}
    content = make_content((0.5, 0.4, 0.6), answers=answers)
    assert said in draw_conclusions(content, True)[-1]
    answers["against"] = "chosen"
    assert "reference" not in draw_conclusions(content, False)[-1]


def test_the_tables():
    bins = [
        {"low": -7, "high": -2, "pairs": 30, "accuracy": figure(0.5, 0.25, 0.75), "confidence": 0.6},
        {"low": 0, "high": 0, "pairs": 10, "accuracy": figure(1.0, 0.7, 1.0), "confidence": 0.6},
    ]
    answers = {
        "prompts": 6,
        "against": "chosen",
        "judge": "rules.py:score",
        "figures": {"kl/samples": figure(-0.001, -0.5, 0.5)},
        "win_rate": {"raw": figure(0.5)},
    }
    content = make_content((0.6, 0.45, 0.75), length_bins=bins, answers=answers)
    assert (
        format_evaluation(content)
        == """\
                             value    95% interval
--------------------------------------------------
reward accuracy              60.0%  45.0% to 75.0%
  lengths balanced           50.0%  40.0% to 60.0%
the longer answer is chosen  50.0%               -

tokens of chosen - rejected  pairs  accuracy     95% interval
-------------------------------------------------------------
-7 to -2                        30     50.0%   25.0% to 75.0%
0                               10    100.0%  70.0% to 100.0%

6 prompts answered, and judged by rules.py:score against the chosen answers
                           value   95% interval
-----------------------------------------------
  win rate as it is        50.0%              -
KL of model and reference   0.00  -0.50 to 0.50"""
    )
