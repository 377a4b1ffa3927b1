"""The loss of ranked lists: by hand, as a distribution, and at its limits."""

from itertools import permutations
from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_wrapper.losses import PlackettLuce, RankedLogProbs
from helpers.ranked_batches import doubles, make_lists

LN2 = log(2)


def test_plackett_luce_by_hand():
    # scores ln 4, ln 2, ln 2: 4/8 for the first to be first, then 2/4
    lists = make_lists([[-1.0 + 2 * LN2, -3.0 + LN2, -2.0 + LN2]], [[-1.0, -3.0, -2.0]])
    assert PlackettLuce(1.0)(lists).tolist() == pytest.approx([2 * LN2], rel=1e-12)
    # the slope in the first score: 4/8 - 1; in the last: 2/8 + 2/4 + 1 - 1
    (slope,) = torch.autograd.grad(PlackettLuce(1.0)(lists).sum(), lists.policy)
    assert slope.tolist()[0] == pytest.approx([-0.5, 0.25 - 0.5, 0.75], abs=1e-12)
    # β = 2 squares the odds: 16/24, then 4/8
    assert PlackettLuce(2.0)(lists).tolist() == pytest.approx([log(24 / 16) + LN2])


@given(st.lists(st.floats(-50, 0), min_size=4, max_size=4), st.floats(0.01, 2))
@settings(max_examples=50, derandomize=True)
def test_plackett_luce_of_two_is_dpo(values: list[float], beta: float):
    lists = make_lists([values[:2]], [values[2:]])
    difference = (values[0] - values[2]) - (values[1] - values[3])
    expected = torch.nn.functional.softplus(doubles([-beta * difference]))
    torch.testing.assert_close(PlackettLuce(beta)(lists), expected, rtol=1e-9, atol=1e-12)


def test_probabilities_of_all_rankings_add_up_to_1():
    scores = [-1.0, 0.3, 2.0, -0.5]
    lists = make_lists([[scores[k] for k in order] for order in permutations(range(4))])
    assert (-PlackettLuce(0.7)(lists)).exp().sum().item() == pytest.approx(1.0)


def test_places_without_a_completion_change_nothing():
    expected = PlackettLuce(0.5)(make_lists([[-1.0, -2.0, -4.0]]))
    for policy, is_real in (
        ([[-1.0, -2.0, -4.0, 7.0]], [[True, True, True, False]]),
        ([[-1.0, 9.0, -2.0, -4.0]], [[True, False, True, True]]),
    ):
        lists = make_lists(policy, None, is_real)
        torch.testing.assert_close(PlackettLuce(0.5)(lists), expected)
        (slope,) = torch.autograd.grad(PlackettLuce(0.5)(lists).sum(), lists.policy)
        assert slope.isfinite().all() and (slope[~lists.is_real] == 0).all()


@pytest.mark.pitfall(17)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loss", [PlackettLuce(), PlackettLuce(10.0)], ids=repr)
def test_values_and_gradients_are_finite_at_the_extremes(loss: PlackettLuce, dtype: torch.dtype):
    values = torch.tensor([0.0, -1e4, -1e-30, -1.0, -104.0, 0.0, -1e4, -1e4], dtype=dtype)
    policy = values.view(2, 4).clone().requires_grad_()
    is_real = torch.tensor([[True] * 4, [True, True, False, False]])
    lists = RankedLogProbs(policy, values.flip(0).view(2, 4), is_real)
    (slope,) = torch.autograd.grad(loss(lists).sum(), policy)
    assert loss(lists).isfinite().all() and slope.isfinite().all()
