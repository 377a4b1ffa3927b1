"""The loss of completions with a label: by hand, and at its extremes."""

from math import log

import pytest
import torch

from dpo_wrapper.losses import KTO, UnpairedLogProbs
from helpers.ranked_batches import make_rows

LN3 = log(3)


def test_kto_by_hand():
    # a = 3 and b = -1, z = 1: σ(β 2) = 3/4 with β = ln 3 / 2, and 1 - σ(β 2) for the other side
    rows = make_rows([-1.0, -3.0], [-4.0, -2.0], [True, False], 1.0)
    loss = KTO(LN3 / 2, desirable=2.0, undesirable=0.5)
    assert loss(rows).tolist() == pytest.approx([2 / 4, 0.5 / 4])
    slopes = torch.autograd.grad(loss(rows).sum(), (rows.policy, rows.kl), allow_unused=True)
    # -β σ (1 - σ) for a desirable completion, +β for an undesirable one, and none for the KL
    assert slopes[0].tolist() == pytest.approx([-2 * LN3 / 2 * 3 / 16, 0.5 * LN3 / 2 * 3 / 16])
    assert slopes[1] is None


def test_a_negative_kl_counts_as_0():
    rows = make_rows([1.0, -1.0], None, [True, False], -5.0)
    assert KTO(LN3)(rows).tolist() == pytest.approx([0.25, 0.25])


@pytest.mark.pitfall(17)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kl", [0.0, -1e4, 1e4])
def test_values_and_gradients_are_finite_at_the_extremes(kl: float, dtype: torch.dtype):
    values = torch.tensor([0.0, -1e4, -1e-30, -1.0, -104.0, 0.0, -1e4, -1e4], dtype=dtype)
    policy = values.clone().requires_grad_()
    rows = UnpairedLogProbs(policy, values.flip(0), values > -1, torch.tensor(kl, dtype=dtype))
    (slope,) = torch.autograd.grad(KTO(10.0)(rows).sum(), policy)
    assert KTO(10.0)(rows).isfinite().all() and slope.isfinite().all()
