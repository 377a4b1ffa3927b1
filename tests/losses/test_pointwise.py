"""Losses of the single log-ratios a = 2 and b = -4 against numbers derived by hand."""

from math import log

import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_wrapper import PairLogProbs
from dpo_wrapper.losses import BCO, NCA, SPPO, APODown, APOZero
from helpers.pair_log_probs import SETTINGS, example_pair, is_close, policy_grads, random_pairs, swap_sides

BETA = log(3) / 2
"""With it σ(βa) = 3/4, σ(βb) = 1/10 and σ(β(a - b)) = 27/28."""


def test_nca_by_hand():
    assert is_close(NCA(BETA)(example_pair()), [log(4 / 3) + 0.5 * log(4) + 0.5 * log(10 / 9)])


def test_bco_by_hand():
    assert is_close(BCO(BETA)(example_pair()), [log(4 / 3) + log(10 / 9)])


def test_apo_by_hand():
    assert is_close(APOZero(BETA)(example_pair()), [0.25 + 0.1])
    assert is_close(APODown(BETA)(example_pair()), [0.75 + 1 / 28])


def test_sppo_by_hand():
    # targets 1 and -1: (2 - 1)² + (-4 + 1)²
    assert is_close(SPPO(0.5)(example_pair()), [10.0])
    assert is_close(policy_grads(SPPO(0.5), example_pair())[1], [-6.0])


@given(random_pairs(), st.floats(1e-3, 1.0))
@SETTINGS
def test_swapped_sides_change_the_loss_by_both_terms(pairs: PairLogProbs, beta: float):
    chosen, rejected = beta * pairs.chosen_logratio, beta * pairs.rejected_logratio
    apo_change = 2 * torch.sigmoid(rejected) - 2 * torch.sigmoid(chosen)
    for loss, change in ((BCO(beta), -chosen + rejected), (APOZero(beta), apo_change)):
        torch.testing.assert_close(loss(pairs) - loss(swap_sides(pairs)), change, rtol=1e-9, atol=1e-7)
