"""What holds for every loss of pairs, found by its class, so that a new one is held to it as well."""

from dataclasses import fields, replace
from itertools import product
from math import inf
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

from dpo_wrapper import DPO, IPO, Loss, PairLogProbs, Sigmoid, SigmoidNorm, SimPO
from dpo_wrapper.losses import EXO, BetaDPO, DiscoPOP, Robust, reference_free
from helpers.batches import random_batch, repad
from helpers.every_loss import EVERY_LOSS, EVERY_LOSS_BUT_MOST_SLOW, LOSS_CLASSES, loss_id
from helpers.loss_oracle import PER_PAIR, WHOLE_BATCH, Pair, oracle_losses
from helpers.models import ZOO
from helpers.pair_log_probs import (
    SETTINGS,
    index_pairs,
    make_pairs,
    policy_grads,
    random_pairs,
    zero_reference,
)

every_loss = pytest.mark.parametrize("loss", EVERY_LOSS, ids=loss_id)


# values and gradients against the oracle


def test_the_oracle_knows_every_loss():
    assert {loss.__name__ for loss in LOSS_CLASSES} == {*PER_PAIR, *WHOLE_BATCH}


def oracle_options(loss: Loss) -> dict:
    options = {option.name: getattr(loss, option.name) for option in fields(loss)}
    if "divergence" in options:
        divergence = options["divergence"]
        values = {option.name: getattr(divergence, option.name) for option in fields(divergence)}
        options["divergence"] = (type(divergence).__name__, values)
    return options


@every_loss
@given(pairs=random_pairs(lowest=-5.0, highest=-0.05, max_length=9))
@settings(max_examples=8, derandomize=True)
def test_values_and_gradients_equal_the_oracle(loss: Loss, pairs: PairLogProbs):
    lengths = pairs.chosen_length.tolist(), pairs.rejected_length.tolist()
    columns = (pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected, *lengths)
    mean_length = sum(lengths[0]) / len(lengths[0])
    scalars = [Pair(*row, mean_length=mean_length) for row in zip(*columns, strict=True)]
    expected = torch.stack(oracle_losses(type(loss).__name__, oracle_options(loss), scalars))
    torch.testing.assert_close(loss(pairs), expected, rtol=1e-9, atol=1e-9)

    leaves = (pairs.chosen, pairs.rejected)
    slopes = torch.autograd.grad(expected.sum(), leaves, allow_unused=True, materialize_grads=True)
    for grad, slope in zip(policy_grads(loss, pairs), slopes, strict=True):
        torch.testing.assert_close(grad, slope, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("loss", [loss for loss in EVERY_LOSS if not isinstance(loss, BetaDPO)], ids=loss_id)
def test_gradients_equal_finite_differences(loss: Loss):
    """BetaDPO's β' depends on the log-probs and has no gradient on purpose."""
    pairs = make_pairs([-3.0, -2.5], [-5.0, -1.0], [-2.0, -2.2], [-4.5, -1.7], [2, 3], [4, 1])

    def call(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return loss(replace(pairs, chosen=chosen, rejected=rejected))

    assert torch.autograd.gradcheck(call, (pairs.chosen, pairs.rejected))


# what a loss depends on


@every_loss
@given(pairs=random_pairs(min_pairs=2))
@settings(max_examples=6, derandomize=True)
def test_there_is_one_value_per_pair_that_depends_on_what_the_class_says(loss: Loss, pairs: PairLogProbs):
    whole = loss(pairs)
    assert whole.shape == pairs.chosen.shape and whole.dtype == torch.float64
    if loss.is_per_pair:
        for k in range(len(whole)):
            assert torch.allclose(loss(index_pairs(pairs, slice(k, k + 1))), whole[k : k + 1])
    without_reference = loss(replace(pairs, ref_chosen=None, ref_rejected=None))
    assert torch.equal(without_reference, loss(zero_reference(pairs)))
    assert loss.needs_reference == (type(loss).__module__ != reference_free.__name__)
    if not loss.needs_reference:
        assert torch.equal(without_reference, whole)


@every_loss
def test_no_pairs_give_no_values(loss: Loss):
    assert loss(make_pairs([], [], [], [])).shape == (0,)


# extremes

EXTREMES = (0.0, -1e-30, -1e-8, -1.0, -88.8, -104.0, -745.2, -1e4)
EXTREME_OPTIONS = [Sigmoid(10.0), Sigmoid(1.0, 0.49), SigmoidNorm(10.0), IPO(10.0), SimPO(50.0, 9.0)]
LOWEST = {Robust: -inf, EXO: -1e-6}
"""Robust has no lower bound; EXO is least at 0, but for rounding."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.pitfall(17)
@pytest.mark.parametrize("loss", EVERY_LOSS + EXTREME_OPTIONS, ids=loss_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_finite_at_the_extremes(loss: Loss, dtype: torch.dtype):
    columns = list(map(list, zip(*product(EXTREMES, repeat=4), strict=True)))
    n_w, n_l = ([1 + (k * step) % 7 for k in range(len(columns[0]))] for step in (3, 5))
    pairs = make_pairs(*columns, n_w=n_w, n_l=n_l, dtype=dtype)
    values = loss(pairs)
    assert values.dtype == torch.promote_types(dtype, torch.float32) and values.isfinite().all()
    assert (values >= LOWEST.get(type(loss), 0.0)).all()
    assert all(grad.isfinite().all() for grad in policy_grads(loss, pairs))


# directions

WITH_A_MINIMUM = {"IPO", "EXO", "NCA", "SPPO", "APODown", "DiscoPOP"}
"""Losses that are least at some distance, or push chosen down on purpose (APO down)."""


@pytest.mark.parametrize("loss", [loss for loss in LOSS_CLASSES if loss.__name__ not in WITH_A_MINIMUM])
@given(pairs=random_pairs(), beta=st.none() | st.floats(1e-3, 10.0))
@SETTINGS
def test_chosen_is_pulled_up_and_rejected_pushed_down(
    loss: type[Any], pairs: PairLogProbs, beta: float | None
):
    has_beta = beta is not None and any(option.name == "beta" for option in fields(loss))
    chosen, rejected = policy_grads(loss(beta=beta) if has_beta else loss(), pairs)
    assert (chosen <= 0).all() and (rejected >= 0).all()


@pytest.mark.parametrize("loss", [loss for loss in EVERY_LOSS if not isinstance(loss, DiscoPOP)], ids=loss_id)
def test_at_the_reference_sides_are_pushed_apart(loss: Loss):
    """DiscoPOP begins by pushing the sides together: its slope at Δ = 0 is β((1 - ln 2) / (4τ) - 3/4) > 0."""
    start = make_pairs([-3.0, -2.0], [-5.0, -1.0], [-3.0, -2.0], [-5.0, -1.0], [2, 3], [4, 1])
    chosen, rejected = policy_grads(loss, start)
    assert (rejected >= 0).all() and (chosen <= 0).all() and (chosen.any() or rejected.any())


# through DPO


@pytest.mark.pitfall(13, 16)
@pytest.mark.usefixtures("one_layer")
@pytest.mark.parametrize("loss", EVERY_LOSS_BUT_MOST_SLOW)
def test_prefix_tree_and_padding_change_nothing(loss: Loss):
    case = random_batch(Generator().manual_seed(11), b=4)
    results = []
    for share_prefix, impl, side in (
        (True, "chunked", "right"),
        (True, "chunked", "left"),
        (False, "eager", "middle"),
    ):
        policy, reference = ZOO["xt-rotary"](0).double(), ZOO["xt-rotary"](1).double()
        options = {"reference": reference, "share_prefix": share_prefix, "log_prob_impl": impl}
        # statistics of its own, if it has them
        dpo = DPO(policy, loss=replace(loss), **options)
        padded = repad(case, side)
        value = dpo(padded.preferred_seq, padded.unpreferred_seq, padded.prompt_masks, padded.seq_masks)
        results.append((value, torch.autograd.grad(value, list(policy.parameters()), allow_unused=True)))
    (expected, expected_grads), *others = results
    assert expected.isfinite() and any(grad is not None and grad.any() for grad in expected_grads)
    scale = max(float(grad.abs().max()) for grad in expected_grads if grad is not None)
    for value, grads in others:
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        for left, right in zip(grads, expected_grads, strict=True):
            assert (left is None) == (right is None)
            assert left is None or float((left - right).abs().max()) < 1e-4 * max(scale, 1e-3)
