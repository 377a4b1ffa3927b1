"""`dpo_loss` against numbers derived by hand and against Sigmoid."""

from math import log, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dpo_wrapper import PairLogProbs, Sigmoid, dpo_loss
from helpers.pair_log_probs import SETTINGS, is_close, make_pairs, random_pairs, sigmoid

LN2, LN3 = log(2), log(3)
REFERENCE = ("ref_chosen_logprobs", "ref_rejected_logprobs")


def test_values_by_hand():
    # margins 1 - (-2) = 3 and 0: β 3 = ln 3 gives -log 3/4, and -log 1/2; their mean
    chosen, rejected = torch.tensor([-4.0, -1.0]).double(), torch.tensor([-9.0, -2.0]).double()
    ref_chosen, ref_rejected = torch.tensor([-5.0, -1.0]).double(), torch.tensor([-7.0, -2.0]).double()
    loss = dpo_loss(
        chosen, rejected, LN3 / 3, ref_chosen_logprobs=ref_chosen, ref_rejected_logprobs=ref_rejected
    )
    assert loss.shape == () and is_close(loss, (log(4 / 3) + LN2) / 2)
    # the simplified form: margins 5 and 1, β = ln 3: σ(5 ln 3) = 243/244, σ(ln 3) = 3/4
    assert is_close(dpo_loss(chosen, rejected, LN3), (log(244 / 243) + log(4 / 3)) / 2)
    # β is 0.1 by default
    assert is_close(dpo_loss(chosen, rejected), -(log(sigmoid(0.5)) + log(sigmoid(0.1))) / 2)


def test_gradients_by_hand():
    pairs = make_pairs([-4.0, -1.0], [-9.0, -2.0], [-5.0, -1.0], [-7.0, -2.0])
    reference = [x.clone().requires_grad_() for x in (pairs.ref_chosen, pairs.ref_rejected)]
    dpo_loss(pairs.chosen, pairs.rejected, LN3 / 3, **dict(zip(REFERENCE, reference, strict=True))).backward()
    # -β (1 - σ) / 2: with σ 3/4 and 1/2
    assert is_close(pairs.chosen.grad, [-LN3 / 3 / 8, -LN3 / 3 / 4])
    assert is_close(pairs.rejected.grad, [LN3 / 3 / 8, LN3 / 3 / 4])
    assert all(x.grad is None for x in reference)  # the reference does not move


@given(random_pairs(), st.floats(1e-3, 10.0))
@SETTINGS
def test_dpo_loss_is_the_mean_of_sigmoid(pairs: PairLogProbs, beta: float):
    reference = {"ref_chosen_logprobs": pairs.ref_chosen, "ref_rejected_logprobs": pairs.ref_rejected}
    loss = dpo_loss(pairs.chosen, pairs.rejected, beta, **reference)
    assert torch.equal(loss, Sigmoid(beta)(pairs).mean())

    # per token, of whatever width, summed over the last axis
    def split(x: Tensor) -> Tensor:
        return torch.stack([0.25 * x, torch.zeros_like(x), 0.75 * x], dim=1)

    reference = {name: split(x) for name, x in reference.items()}
    torch.testing.assert_close(dpo_loss(split(pairs.chosen), split(pairs.rejected), beta, **reference), loss)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    sides = [-torch.rand(4, 1000, generator=generator) for _ in range(4)]
    sides = [x.to(dtype).requires_grad_() for x in sides]
    loss = dpo_loss(*sides[:2], **dict(zip(REFERENCE, sides[2:], strict=True)))
    wide = [x.detach().double() for x in sides]
    expected = dpo_loss(*wide[:2], **dict(zip(REFERENCE, wide[2:], strict=True)))
    assert loss.dtype == torch.float32  # sums of a thousand tokens, exact to float32's own rounding
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert sides[0].grad.dtype == dtype and sides[0].grad.isfinite().all()
    assert dpo_loss(*[x[:, 0] for x in sides[:2]]).dtype == torch.float32


def test_float64_stays_float64():
    assert dpo_loss(torch.zeros(2).double(), torch.zeros(2).double()).dtype == torch.float64


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), (2, 5)])
def test_the_loss_is_a_scalar_for_every_shape(shape: tuple[int, ...]):
    x = torch.randn(shape)
    assert dpo_loss(x, x).shape == () and dpo_loss(x, x).item() == pytest.approx(LN2)


X, Y = torch.zeros(2), torch.zeros(3)
SHAPES = "log-probs should all have one shape, (b,) or (b, n), but the shapes are"
BOTH = "ref_chosen_logprobs and ref_rejected_logprobs should both be given, but only"


@pytest.mark.parametrize(
    "sides, reference, message",
    [
        ((X, Y), (None, None), f"{SHAPES} [(2,), (3,)]."),
        ((X, X[None]), (None, None), f"{SHAPES} [(2,), (1, 2)]."),
        ((X[None], X[:, None]), (None, None), f"{SHAPES} [(1, 2), (2, 1)]."),
        ((X[0], X[0]), (None, None), f"{SHAPES} [(), ()]."),
        ((X[None, None], X[None, None]), (None, None), f"{SHAPES} [(1, 1, 2), (1, 1, 2)]."),
        ((X, X), (Y, Y), f"{SHAPES} [(2,), (2,), (3,), (3,)]."),
        ((X, X), (X, X[:1]), f"{SHAPES} [(2,), (2,), (2,), (1,)]."),
        ((X, X), (X, None), f"{BOTH} the first is: add the other or leave both out."),
        ((X, X), (None, X), f"{BOTH} the second is: add the other or leave both out."),
        ((X[:0], X[:0]), (None, None), "log-probs should hold at least one pair, but their shape is (0,)."),
        ((X, X, 0.0), (None, None), "Sigmoid: beta should be positive, but it is 0.0."),
        ((X, X, -1), (None, None), "Sigmoid: beta should be positive, but it is -1."),
        ((X, X, nan), (None, None), "Sigmoid: beta should be positive, but it is nan."),
    ],
)
def test_bad_arguments_are_refused(sides: tuple, reference: tuple, message: str):
    with pytest.raises(ValueError) as caught:
        dpo_loss(*sides, **dict(zip(REFERENCE, reference, strict=True)))
    assert str(caught.value) == message
