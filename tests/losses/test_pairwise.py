"""Losses of Δ against numbers derived by hand, and their relations to one another.

The example pair has p_w = -4, p_l = -9, r_w = -6, r_l = -5, n_w = 2, n_l = 4: a = 2, b = -4, Δ = 6.
"""

from dataclasses import replace
from math import exp, log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_wrapper import Loss, PairLogProbs
from dpo_wrapper.losses import DPOP, EXO, IPO, AlphaDivergence, DiscoPOP, Hinge, Robust, Sigmoid, SigmoidNorm
from helpers.pair_log_probs import (
    SETTINGS,
    example_pair,
    is_close,
    make_pairs,
    policy_grads,
    random_pairs,
    sigmoid,
    swap_sides,
)

LN2, LN3 = log(2), log(3)


def test_sigmoid_by_hand():
    # βΔ = (ln 3 / 6) 6 = ln 3: σ = 3/4
    assert is_close(Sigmoid(beta=LN3 / 6)(example_pair()), [log(4 / 3)])
    # d/da = -β (1 - 3/4), d/db = +β (1 - 3/4)
    chosen, rejected = policy_grads(Sigmoid(beta=LN3 / 6), example_pair())
    assert is_close(chosen, [-LN3 / 24]) and is_close(rejected, [LN3 / 24])
    # with ε = 1/4: 3/4 ln(4/3) + 1/4 ln 4
    smoothed = Sigmoid(LN3 / 6, label_smoothing=0.25)
    assert is_close(smoothed(example_pair()), [0.75 * log(4 / 3) + 0.25 * log(4)])
    # and there it is least: σ = 3/4 = 1 - ε
    chosen, rejected = policy_grads(smoothed, example_pair())
    assert is_close(chosen, [0.0]) and is_close(rejected, [0.0])


def test_sigmoid_without_a_reference_by_hand():
    # p_w - p_l = 5; β 5 = ln 7: σ = 7/8
    assert is_close(Sigmoid(log(7) / 5)(make_pairs([-4.0], [-9.0])), [log(8 / 7)])


def test_sigmoid_norm_by_hand():
    # a / 2 - b / 4 = 1 + 1 = 2; β 2 = ln 3: σ = 3/4
    assert is_close(SigmoidNorm(beta=LN3 / 2)(example_pair()), [log(4 / 3)])
    chosen, rejected = policy_grads(SigmoidNorm(beta=LN3 / 2), example_pair())
    assert is_close(chosen, [-LN3 / 2 / 4 / 2]) and is_close(rejected, [LN3 / 2 / 4 / 4])


@pytest.mark.pitfall(16)
def test_ipo_by_hand():
    # (a / 2 - b / 4 - 1 / (2β))² = (2 - 1/2)²; over sums it would be (6 - 1/2)² (pitfall 16)
    assert is_close(IPO(beta=1.0)(example_pair()), [9 / 4])
    # 2 (3/2) / 2 and -2 (3/2) / 4
    chosen, rejected = policy_grads(IPO(beta=1.0), example_pair())
    assert is_close(chosen, [3 / 2]) and is_close(rejected, [-3 / 4])
    # the margin it aims at is 1 / (2β) = 2
    assert is_close(IPO(beta=0.25)(example_pair()), [0.0])


def test_robust_by_hand():
    # σ(βΔ) = 3/4
    expected = (0.75 * log(4 / 3) - 0.25 * log(4)) / 0.5
    assert is_close(Robust(LN3 / 6, 0.25)(example_pair()), [expected])
    # d/da = -β (3/4 (1 - 3/4) + 1/4 3/4) / (1/2)
    chosen, _ = policy_grads(Robust(LN3 / 6, 0.25), example_pair())
    assert is_close(chosen, [-LN3 / 6 * (3 / 16 + 3 / 16) / 0.5])


def test_hinge_by_hand():
    assert is_close(Hinge(1 / 12)(example_pair()), [0.5])
    assert is_close(policy_grads(Hinge(1 / 12), example_pair())[0], [-1 / 12])
    assert is_close(Hinge(1.0)(example_pair()), [0.0])
    assert is_close(policy_grads(Hinge(1.0), example_pair())[1], [0.0])


def test_exo_by_hand():
    # σ(βΔ) = 3/4, which is what labels with ε = 1/4 ask for; with ε = 1/8 it is not
    assert is_close(EXO(LN3 / 6, 0.25)(example_pair()), [0.0])
    assert is_close(EXO(LN3 / 6, 0.125)(example_pair()), [0.75 * log(6 / 7) + 0.25 * log(2)])


def test_discopop_by_hand():
    # τ = 1: w = 3/4, -log σ(z) = ln(4/3), e^-z = 1/3
    assert is_close(DiscoPOP(LN3 / 6, tau=1.0)(example_pair()), [0.25 * log(4 / 3) + 0.25])


def test_dpop_by_hand():
    # chosen above its reference: DPO itself
    assert is_close(DPOP(LN3 / 6)(example_pair()), [log(4 / 3)])
    # a = -2, b = -4, lost 2: 2 - 2 / 2 = 1; the slope in a is -β (1 + 1/2) / 4
    pair = make_pairs([-6.0], [-9.0], [-4.0], [-5.0])
    assert is_close(DPOP(LN3, penalty=0.5)(pair), [log(4 / 3)])
    assert is_close(policy_grads(DPOP(LN3, penalty=0.5), pair)[0], [-LN3 * 1.5 / 4])


def test_defaults():
    assert is_close(Sigmoid()(example_pair()), [-log(sigmoid(0.6))])
    assert is_close(SigmoidNorm()(example_pair()), [-log(sigmoid(0.2))])
    assert is_close(IPO()(example_pair()), [9.0])  # (2 - 5)²
    assert Sigmoid().label_smoothing == 0.0


def test_margins_by_hand():
    pair = replace(example_pair(), margins=torch.tensor([LN3], dtype=torch.float64))
    # βΔ = 2 ln 3, less ln 3
    for loss in (Sigmoid(LN3 / 3), Robust(LN3 / 3, 0.0), DPOP(LN3 / 3)):
        assert is_close(loss(pair), [log(4 / 3)])
    assert is_close(Hinge(1 / 6)(pair), [LN3])  # 1 - (1 - ln 3)
    assert is_close(SigmoidNorm(LN3)(pair), [log(4 / 3)])  # β 2 - ln 3
    no_margin = replace(example_pair(), margins=torch.zeros(1).double())
    assert torch.equal(Sigmoid()(no_margin), Sigmoid()(example_pair()))


def test_values_of_sigmoid_far_from_zero_by_hand():
    # -log σ(x) is -x for x far below zero and e^-x far above, which is 0 in the end
    pairs = make_pairs([-1e4, 0.0], [0.0, -1e4], dtype=torch.float32)
    assert Sigmoid(1.0)(pairs).tolist() == [1e4, 0.0]
    chosen, rejected = policy_grads(Sigmoid(1.0), pairs)
    assert chosen.tolist() == [-1.0, 0.0] and rejected.tolist() == [1.0, 0.0]
    # but not before: float32's 1 + e^-50 is 1, and its log would be 0
    pair = make_pairs([0.0], [-50.0], dtype=torch.float32)
    assert Sigmoid(1.0)(pair).item() == pytest.approx(exp(-50), rel=1e-5)
    assert policy_grads(Sigmoid(1.0), pair)[0].item() == pytest.approx(-exp(-50), rel=1e-5)


# relations


def assert_same(pairs: PairLogProbs, left: Loss, right: Loss) -> None:
    torch.testing.assert_close(left(pairs), right(pairs), rtol=1e-9, atol=1e-9)


@given(random_pairs(), st.floats(1e-3, 10.0))
@SETTINGS
def test_options_at_their_limits_give_the_simpler_loss(pairs: PairLogProbs, beta: float):
    assert torch.equal(Sigmoid(beta, 0.0)(pairs), Sigmoid(beta)(pairs))
    assert_same(pairs, Robust(beta, 0.0), Sigmoid(beta))
    assert_same(pairs, DPOP(beta, penalty=0.0), Sigmoid(beta))
    for loss in (Sigmoid, SigmoidNorm, Hinge, IPO, Robust, EXO, DiscoPOP):
        assert_same(pairs, loss(beta, divergence=AlphaDivergence(1.0)), loss(beta))
    # where all lengths are n, per token is the same as β / n
    eight = torch.full_like(pairs.chosen_length, 8)
    equal_lengths = replace(pairs, chosen_length=eight, rejected_length=eight)
    torch.testing.assert_close(SigmoidNorm(8 * beta)(equal_lengths), Sigmoid(beta)(equal_lengths))


@given(random_pairs(), st.floats(1e-3, 10.0))
@SETTINGS
def test_label_smoothing_is_the_mean_over_wrong_labels(pairs: PairLogProbs, beta: float):
    mean = 0.7 * Sigmoid(beta)(pairs) + 0.3 * Sigmoid(beta)(swap_sides(pairs))
    torch.testing.assert_close(Sigmoid(beta, 0.3)(pairs), mean)


@given(random_pairs(), st.floats(1e-3, 1.0))
@SETTINGS
def test_mean_of_robust_over_wrong_labels_is_sigmoid(pairs: PairLogProbs, beta: float):
    mean = 0.8 * Robust(beta, 0.2)(pairs) + 0.2 * Robust(beta, 0.2)(swap_sides(pairs))
    torch.testing.assert_close(mean, Sigmoid(beta)(pairs), rtol=1e-9, atol=1e-7)


@given(random_pairs(), st.floats(1e-3, 1.0))
@SETTINGS
def test_swapped_sides_change_the_loss_by_the_logit(pairs: PairLogProbs, beta: float):
    logits = beta * (pairs.chosen_logratio - pairs.rejected_logratio)
    for loss, change in ((Sigmoid(beta, 0.2), -0.6 * logits), (Robust(beta, 0.2), -logits / 0.6)):
        torch.testing.assert_close(loss(pairs) - loss(swap_sides(pairs)), change, rtol=1e-9, atol=1e-7)


@given(random_pairs(), st.floats(1e-3, 10.0))
@SETTINGS
def test_ipo_pulls_towards_its_margin_from_both_sides(pairs: PairLogProbs, beta: float):
    margin = pairs.chosen_logratio / pairs.chosen_length - pairs.rejected_logratio / pairs.rejected_length
    chosen, rejected = policy_grads(IPO(beta), pairs)
    for grad, sign in ((chosen, 1), (rejected, -1)):
        assert torch.equal(grad.sign(), sign * (margin - 1 / (2 * beta)).sign())


@given(random_pairs())
@SETTINGS
def test_values_at_the_reference(pairs: PairLogProbs):
    start = replace(pairs, ref_chosen=pairs.chosen.detach(), ref_rejected=pairs.rejected.detach())
    for loss in (Sigmoid(0.3), Sigmoid(0.3, 0.2), SigmoidNorm(0.3)):
        assert (loss(start) - LN2).abs().max() < 1e-15  # the log of 2 itself
    assert torch.equal(IPO(0.5)(start), torch.ones_like(pairs.chosen))  # (0 - 1)²
    sides = [pairs.chosen.tolist(), pairs.rejected.tolist()]
    single = make_pairs(*sides, *sides, dtype=torch.float32)
    assert (Sigmoid()(single) == torch.tensor(LN2)).all()


@given(st.floats(-8.0, 8.0))
@SETTINGS
def test_exo_with_almost_no_smoothing_is_finite(x: float):
    value = EXO(0.5, 1e-9)(make_pairs([-abs(x)], [-1.0]))
    assert value.isfinite() and value >= -1e-12
