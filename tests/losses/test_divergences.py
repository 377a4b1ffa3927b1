"""Scores of divergences against numbers derived by hand, and at their limits."""

from math import log
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_wrapper.losses import AlphaDivergence, ForwardKL, Hinge, JensenShannon, ReverseKL
from dpo_wrapper.losses.registry import builtin_losses
from helpers.pair_log_probs import SETTINGS, is_close, make_pairs

LN2 = log(2)


def test_scores_by_hand():
    logratio = torch.tensor([LN2], dtype=torch.float64)
    assert is_close(ReverseKL()(logratio), [LN2]) and is_close(ForwardKL()(logratio), [0.5])
    assert is_close(JensenShannon()(logratio), [log(4 / 3)])
    # (e^(-a / 2) - 1) / (-1/2) at a = 2 ln 2
    assert is_close(AlphaDivergence()(2 * logratio), [1.0])


def test_losses_are_computed_from_scores_by_hand():
    # s_w = 1/2, s_l = 0: 1 - 1/2
    assert is_close(Hinge(1.0, ForwardKL())(make_pairs([LN2], [0.0])), [0.5])


@pytest.mark.parametrize(
    "divergence", [ForwardKL(), AlphaDivergence(), AlphaDivergence(3.0), JensenShannon()], ids=repr
)
def test_scores_and_their_squares_are_finite_at_the_extremes(divergence):
    for logratio in (torch.tensor([-1e4]), torch.tensor([1e4])):
        score = divergence(logratio)
        assert score.isfinite() and score.square().isfinite()


@given(st.floats(-8.0, 8.0))
@SETTINGS
def test_alpha_divergence_has_both_kl_divergences_as_limits(x: float):
    logratio = torch.tensor([x], dtype=torch.float64)
    torch.testing.assert_close(AlphaDivergence(1 - 1e-9)(logratio), logratio, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(AlphaDivergence(0.0)(logratio), ForwardKL()(logratio))


WITH_DIVERGENCE = {"Sigmoid", "SigmoidNorm", "Robust", "Hinge", "IPO", "EXO", "DiscoPOP"}


@pytest.mark.parametrize("loss", builtin_losses())
def test_only_losses_of_scores_take_a_divergence(loss: type[Any]):
    if loss.__name__ in WITH_DIVERGENCE:
        assert loss(divergence=ForwardKL()) != loss()
    else:
        with pytest.raises(TypeError, match="divergence"):
            loss(divergence=ForwardKL())
