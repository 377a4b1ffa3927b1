"""What holds for every loss there is, found by its class, so that a new one is held to it as well."""

from dataclasses import fields, replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

from dpo_wrapper import DPO, Loss, PairLogProbs
from dpo_wrapper import losses as package
from dpo_wrapper.losses.describe import describe, help_text, ours, table
from dpo_wrapper.losses.registry import parse_losses
from helpers.batches import random_batch, repad
from helpers.every_loss import EVERY, KINDS, shown
from helpers.loss_oracle import PER_PAIR, WHOLE_BATCH, Pair, oracle
from helpers.models import ZOO
from helpers.pair_log_probs import FAST, grads, pairs, some_pairs


def test_every_class_is_described():
    for kind in ours():
        of = describe(kind)
        assert of.formula and of.paper and of.purpose, kind
        assert not any("|" in text for text in vars(of).values()), kind
        assert all(each.metadata["help"] for each in fields(kind)), kind
        assert f"| `{kind()!r}` |" in table()
        assert f" {kind.__name__.lower()}(" in help_text() or f" {kind.__name__.lower()}," in help_text()
        assert getattr(package, kind.__name__) is kind, "export it from dpo_wrapper/losses/__init__.py"


def test_oracle_knows_every_class():
    assert {kind.__name__ for kind in KINDS} == {*PER_PAIR, *WHOLE_BATCH}


@pytest.mark.parametrize("loss", EVERY, ids=shown)
def test_text_gives_the_loss_back(loss: Loss):
    assert parse_losses(repr(loss)) == ((loss, 1.0),)


# values and gradients against the oracle


def options_of(loss: Loss) -> dict:
    options = {each.name: getattr(loss, each.name) for each in fields(loss)}
    if "divergence" in options:
        of = options["divergence"]
        options["divergence"] = (type(of).__name__, {x.name: getattr(of, x.name) for x in fields(of)})
    return options


near = st.floats(-5.0, -0.05)
lengths = st.integers(1, 9)


@st.composite
def near_pairs(draw, least: int = 1) -> PairLogProbs:
    rows = draw(st.lists(st.tuples(*[near] * 4, lengths, lengths), min_size=least, max_size=4))
    return pairs(*map(list, zip(*rows, strict=True)))


@pytest.mark.parametrize("loss", EVERY, ids=shown)
@given(given_pairs=near_pairs())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_values_and_gradients_equal_the_oracle(loss: Loss, given_pairs: PairLogProbs):
    columns = (
        given_pairs.chosen,
        given_pairs.rejected,
        given_pairs.ref_chosen,
        given_pairs.ref_rejected,
        given_pairs.chosen_length.tolist(),
        given_pairs.rejected_length.tolist(),
    )
    mean = sum(columns[4]) / len(columns[4])
    xs = [Pair(*row, mean_length=mean) for row in zip(*columns, strict=True)]
    expected = torch.stack(oracle(type(loss).__name__, options_of(loss), xs))
    torch.testing.assert_close(loss(given_pairs), expected, rtol=1e-9, atol=1e-9)

    leaves = (given_pairs.chosen, given_pairs.rejected)
    slopes = torch.autograd.grad(expected.sum(), leaves, allow_unused=True, materialize_grads=True)
    for found, slope in zip(grads(loss, given_pairs), slopes, strict=True):
        torch.testing.assert_close(found, slope, rtol=1e-8, atol=1e-9)


# what a loss may and may not look at


@pytest.mark.parametrize("loss", EVERY, ids=shown)
@given(given_pairs=some_pairs(least=2))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_shape_dtype_and_reference(loss: Loss, given_pairs: PairLogProbs):
    whole = loss(given_pairs)
    assert whole.shape == given_pairs.chosen.shape and whole.dtype == torch.float64
    if loss.per_pair:
        for k in range(len(whole)):
            row = {name: x[k : k + 1] for name, x in vars(given_pairs).items() if x is not None and x.ndim}
            assert torch.allclose(loss(replace(given_pairs, **row)), whole[k : k + 1])
    bare = replace(given_pairs, ref_chosen=None, ref_rejected=None)
    zeros = torch.zeros_like(given_pairs.chosen)
    assert torch.equal(loss(bare), loss(replace(given_pairs, ref_chosen=zeros, ref_rejected=zeros)))
    if not loss.needs_reference:
        assert torch.equal(loss(bare), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_no_pairs(kind: type[Loss]):
    assert kind()(pairs([], [], [], [])).shape == (0,)


EXTREMES = (0.0, -1e-30, -1e-8, -1.0, -88.8, -104.0, -745.2, -1e4)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.pitfall(17)
@pytest.mark.parametrize("loss", EVERY, ids=shown)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finite_at_the_extremes(loss: Loss, dtype: torch.dtype):
    columns = list(map(list, zip(*product(EXTREMES, repeat=4), strict=True)))
    n_w, n_l = ([1 + (k * step) % 7 for k in range(len(columns[0]))] for step in (3, 5))
    extreme = pairs(*columns, n_w, n_l, dtype)
    values = loss(extreme)
    assert values.dtype == torch.promote_types(dtype, torch.float32) and values.isfinite().all()
    assert all(slope.isfinite().all() for slope in grads(loss, extreme))


TURNS = {"IPO", "EXO", "NCA", "SPPO", "APODown", "DiscoPOP"}
"""Losses that are least at some distance, or push chosen down on purpose (APO down)."""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.__name__ not in TURNS])
@given(given_pairs=some_pairs())
@FAST
def test_chosen_is_pulled_up_and_rejected_pushed_down(kind: type[Loss], given_pairs: PairLogProbs):
    chosen, rejected = grads(kind(), given_pairs)
    assert (chosen <= 0).all() and (rejected >= 0).all()


@pytest.mark.parametrize("loss", [x for x in EVERY if not isinstance(x, package.DiscoPOP)], ids=shown)
def test_direction_at_the_reference(loss: Loss):
    """DiscoPOP begins by pushing the sides together: its slope at Δ = 0 is β((1 - ln 2) / (4τ) - 3/4) > 0."""
    start = pairs([-3.0, -2.0], [-5.0, -1.0], [-3.0, -2.0], [-5.0, -1.0], [2, 3], [4, 1])
    chosen, rejected = grads(loss, start)
    assert (rejected >= 0).all() and (chosen <= 0).all() and (chosen.any() or rejected.any())


# through the whole of DPO


@pytest.mark.pitfall(13, 16)
@pytest.mark.parametrize("loss", EVERY, ids=shown)
def test_prefix_tree_and_padding_change_nothing(loss: Loss):
    case = random_batch(Generator().manual_seed(11), b=4)
    results = []
    for share, impl, side in (
        (True, "chunked", "right"),
        (True, "chunked", "left"),
        (False, "eager", "middle"),
    ):
        policy, reference = ZOO["xt-rotary"](0).double(), ZOO["xt-rotary"](1).double()
        dpo = DPO(policy, loss=loss, reference=reference, share_prefix=share, log_prob_impl=impl)
        other = repad(case, side)
        value = dpo(other.preferred_seq, other.unpreferred_seq, other.prompt_masks, other.seq_masks)
        found = torch.autograd.grad(value, list(policy.parameters()), allow_unused=True)
        results.append((value, found))
    first, others = results[0], results[1:]
    assert first[0].isfinite() and any(x is not None and x.any() for x in first[1])
    scale = max(float(x.abs().max()) for x in first[1] if x is not None)
    for value, found in others:
        torch.testing.assert_close(value, first[0], rtol=1e-5, atol=1e-6)
        for a, b in zip(found, first[1], strict=True):
            assert (a is None) == (b is None)
            assert a is None or float((a - b).abs().max()) < 1e-4 * max(scale, 1e-3)
