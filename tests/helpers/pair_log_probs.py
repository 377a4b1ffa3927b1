"""Log-probs of pairs, written by hand or drawn at random, and the gradients of losses."""

from dataclasses import replace
from math import exp

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_wrapper import Loss, PairLogProbs

SETTINGS = settings(max_examples=50, derandomize=True)


def make_pairs(
    chosen: list[float],
    rejected: list[float],
    ref_chosen: list[float] | None = None,
    ref_rejected: list[float] | None = None,
    n_w: list[int] | None = None,
    n_l: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> PairLogProbs:
    """The policy's log-probs are leaves that require gradients; lengths are 1 unless given."""

    def floats(values: list[float] | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=dtype)

    lengths = [torch.tensor(n or [1] * len(chosen), dtype=torch.long) for n in (n_w, n_l)]
    mean = lengths[0].to(dtype).sum() / max(1, len(chosen))
    sides = (floats(chosen), floats(rejected), floats(ref_chosen), floats(ref_rejected))
    for policy in sides[:2]:
        policy.requires_grad_()
    return PairLogProbs(*sides, *lengths, mean_chosen_length=mean)


def example_pair() -> PairLogProbs:
    """The pair of the tests by hand: a = 2, b = -4, Δ = 6, with 2 and 4 scored tokens."""
    return make_pairs([-4.0], [-9.0], [-6.0], [-5.0], [2], [4])


def index_pairs(pairs: PairLogProbs, index: slice | list[int]) -> PairLogProbs:
    """Some of the pairs; the mean length stays that of all."""
    columns = {name: value for name, value in vars(pairs).items() if value is not None and value.ndim}
    return replace(pairs, **{name: value[index] for name, value in columns.items()})


def swap_sides(pairs: PairLogProbs) -> PairLogProbs:
    """The same log-probs with the labels the wrong way round; lengths stay."""
    policy = {"chosen": pairs.rejected, "rejected": pairs.chosen}
    return replace(pairs, **policy, ref_chosen=pairs.ref_rejected, ref_rejected=pairs.ref_chosen)


def zero_reference(pairs: PairLogProbs) -> PairLogProbs:
    """The same policy with a reference whose log-probs are all 0."""
    zeros = torch.zeros_like(pairs.chosen)
    return replace(pairs, ref_chosen=zeros, ref_rejected=zeros)


def policy_grads(loss: Loss, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
    """The gradients of the sum of the losses with respect to the policy's log-probs."""
    leaves = (pairs.chosen, pairs.rejected)
    chosen, rejected = torch.autograd.grad(
        loss(pairs).sum(), leaves, allow_unused=True, materialize_grads=True
    )
    return chosen, rejected


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def is_close(values: Tensor, expected: list[float], rel: float = 1e-12) -> bool:
    assert values.dtype == torch.float64
    return values.tolist() == pytest.approx(expected, rel=rel, abs=1e-12)


@st.composite
def random_pairs(
    draw, min_pairs: int = 1, lowest: float = -200.0, highest: float = 0.0, max_length: int = 50
) -> PairLogProbs:
    """A strategy for one to four pairs with log-probs between `lowest` and `highest`."""
    columns = [st.floats(lowest, highest)] * 4 + [st.integers(1, max_length)] * 2
    rows = draw(st.lists(st.tuples(*columns), min_size=min_pairs, max_size=4))
    return make_pairs(*map(list, zip(*rows, strict=True)))
