"""Losses without a reference against numbers derived by hand, and their relations to one another.

The example pair has p_w = -4, p_l = -9, n_w = 2, n_l = 4.
"""

from dataclasses import replace
from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_wrapper import PairLogProbs
from dpo_wrapper.losses import CPO, ORPO, SFT, AlphaPO, ReferenceFree, Sigmoid, SigmoidNorm, SimPO
from helpers.pair_log_probs import (
    SETTINGS,
    example_pair,
    is_close,
    make_pairs,
    policy_grads,
    random_pairs,
    zero_reference,
)

LN2, LN3 = log(2), log(3)


def test_sft_by_hand():
    # two pairs with 1 and 3 scored tokens, log-probs -2 and -4: mean over tokens -(-2 - 4) / 4 = 3/2
    pairs = make_pairs([-2.0, -4.0], [-7.0, -8.0], n_w=[1, 3], n_l=[9, 9])
    assert is_close(SFT()(pairs), [1.0, 2.0]) and is_close(SFT()(pairs).mean(), 1.5)
    chosen, rejected = policy_grads(SFT(), pairs)
    assert is_close(chosen, [-0.5, -0.5]) and is_close(rejected, [0.0, 0.0])


def test_reference_free_by_hand():
    # p_w - p_l = 5, β 5 = ln 7: σ = 7/8
    assert is_close(ReferenceFree(log(7) / 5)(example_pair()), [log(8 / 7)])
    smoothed = ReferenceFree(log(7) / 5, 0.25)
    assert is_close(smoothed(example_pair()), [0.75 * log(8 / 7) + 0.25 * log(8)])


def test_cpo_by_hand():
    # as above, and 3/2 times 4 / 2 nats per token
    assert is_close(CPO(log(7) / 5, alpha=1.5)(example_pair()), [log(8 / 7) + 3.0])


@pytest.mark.pitfall(16)
def test_simpo_by_hand():
    # p_w / 2 - p_l / 4 = -2 + 9/4 = 1/4; β/4 - γ = 4 ln 3 / 4 - ln 3 / 2 = ln 3 / 2
    loss = SimPO(beta=4 * LN3, gamma=LN3 / 2)
    assert is_close(loss(example_pair()), [log(1 + 3**-0.5)])
    # -β (1 - σ) / n_w, with 1 - σ = 1 / (1 + √3)
    chosen, rejected = policy_grads(loss, example_pair())
    slope = 4 * LN3 / (1 + 3**0.5)
    assert is_close(chosen, [-slope / 2]) and is_close(rejected, [slope / 4])


def test_alpha_po_by_hand():
    # means -1 and -2, α = ln 2: rewards -1 / ln 2 and -3 / ln 2
    pair = make_pairs([-1.0], [-4.0], n_w=[1], n_l=[2])
    assert is_close(AlphaPO(LN2 * LN3 / 2, gamma=0.0, alpha=LN2)(pair), [log(4 / 3)])


def test_orpo_by_hand():
    # means ln(3/4) and ln(1/4): odds 3 and 1/3, o = ln 9
    pair = make_pairs([log(3 / 4)], [2 * log(1 / 4)], n_w=[1], n_l=[2])
    assert is_close(ORPO(1.0)(pair), [log(4 / 3) + log(10 / 9)])


def test_defaults():
    assert is_close(SimPO()(example_pair()), [LN2])  # 2/4 - 1/2 = 0
    assert (SimPO().beta, SimPO().gamma) == (2.0, 0.5)


def test_margins_by_hand():
    pair = replace(example_pair(), margins=torch.tensor([LN3], dtype=torch.float64))
    # β 5 = 2 ln 3, less ln 3
    assert is_close(ReferenceFree(2 * LN3 / 5)(pair), [log(4 / 3)])
    assert is_close(CPO(2 * LN3 / 5, alpha=0.0)(pair), [log(4 / 3)])
    # β/4 - γ = 3 ln 3 - ln 3, less ln 3
    assert is_close(SimPO(12 * LN3, gamma=LN3)(pair), [log(4 / 3)])
    assert is_close(AlphaPO(12 * LN3, gamma=LN3, alpha=0.0)(pair), [log(4 / 3)])


# relations


@given(random_pairs(), st.floats(1e-3, 10.0))
@SETTINGS
def test_options_at_their_limits_give_the_simpler_loss(pairs: PairLogProbs, beta: float):
    for left, right in (
        (CPO(beta, 0.1, alpha=0.0), ReferenceFree(beta, 0.1)),
        (AlphaPO(beta, 0.3, alpha=0.0), SimPO(beta, 0.3)),
    ):
        torch.testing.assert_close(left(pairs), right(pairs), rtol=1e-9, atol=1e-9)


@given(random_pairs(), st.floats(1e-3, 10.0))
@SETTINGS
def test_no_reference_is_a_reference_of_zeros(pairs: PairLogProbs, beta: float):
    assert torch.equal(SimPO(beta, gamma=0.0)(pairs), SigmoidNorm(beta)(zero_reference(pairs)))
    assert torch.equal(ReferenceFree(beta)(pairs), Sigmoid(beta)(zero_reference(pairs)))


@given(st.floats(-8.0, 8.0))
@SETTINGS
def test_alpha_po_near_its_limit_is_simpo(x: float):
    pair = make_pairs([-abs(x)], [-1.0])
    torch.testing.assert_close(AlphaPO(alpha=1e-9)(pair), SimPO()(pair), rtol=1e-7, atol=1e-7)
