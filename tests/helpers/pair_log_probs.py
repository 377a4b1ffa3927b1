"""Log-probs of pairs as the tests of losses write them."""

from math import exp

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_wrapper import Loss, PairLogProbs

FAST = settings(max_examples=100, deadline=None, derandomize=True)


def pairs(
    chosen: list[float],
    rejected: list[float],
    ref_chosen: list[float] | None = None,
    ref_rejected: list[float] | None = None,
    n_w: list[int] | None = None,
    n_l: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> PairLogProbs:
    """Policy log-probs as leaves that want gradients; lengths are 1 unless given."""

    def floats(values: list[float] | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=dtype)

    lengths = [torch.tensor(n or [1] * len(chosen), dtype=torch.long) for n in (n_w, n_l)]
    mean = lengths[0].to(dtype).sum() / max(1, len(chosen))
    policy = (floats(chosen).requires_grad_(), floats(rejected).requires_grad_())
    return PairLogProbs(*policy, floats(ref_chosen), floats(ref_rejected), *lengths, mean)


def grads(loss: Loss, given: PairLogProbs) -> tuple[Tensor, Tensor]:
    chosen, rejected = torch.autograd.grad(
        loss(given).sum(), (given.chosen, given.rejected), allow_unused=True, materialize_grads=True
    )
    return chosen, rejected


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def is_close(values: Tensor, expected: list[float], rel: float = 1e-12) -> bool:
    assert values.dtype == torch.float64
    return values.tolist() == pytest.approx(expected, rel=rel, abs=1e-12)


log_probs = st.floats(-200.0, 0.0)
lengths = st.integers(1, 50)


@st.composite
def some_pairs(draw, least: int = 1) -> PairLogProbs:
    rows = draw(st.lists(st.tuples(*[log_probs] * 4, lengths, lengths), min_size=least, max_size=4))
    return pairs(*map(list, zip(*rows, strict=True)))
