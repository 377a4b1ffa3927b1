"""A tile of logits by torch's own operations, on any device."""

from functools import lru_cache
from typing import Any

import torch
from beartype import beartype
from jaxtyping import Float, Int, jaxtyped
from torch import Tensor

from dpo_wrapper.log_probs.backward import against
from dpo_wrapper.log_probs.eager import accumulation_dtype, compute_dtype
from dpo_wrapper.log_probs.fused_backward import FusedLoss, FusedLossLogProbs, split_for_fused_loss
from dpo_wrapper.log_probs.statistics import Folded
from dpo_wrapper.log_probs.tiled import TiledLogProbs
from dpo_wrapper.log_probs.tiles import Fold, Options

TILE_BYTES = {"cpu": 12 * 2**20, "other": 256 * 2**20}
"""Memory of a tile: on the CPU what stays in its cache, and under the size from which the C library hands
memory back to the system each time."""

PART_ROWS = {"cpu": 512, "other": 2048}

KEEP_BYTES = 64 * 2**20
KEEP_HEADS = 4
"""On the CPU: what training the head takes anyway, for its weight, gradient and AdamW's two moments."""


def keep_bytes(weight: Float[Tensor, "v d"]) -> int:
    """Memory for softmaxes that are kept from forward to backward, so that they are not computed twice."""
    if weight.device.type != "cpu":
        return KEEP_BYTES
    return max(KEEP_BYTES, KEEP_HEADS * weight.numel() * weight.element_size())


def part_rows(weight: Float[Tensor, "v d"]) -> int:
    """Tokens that are finished at once where their loss is known.

    Each time the head's gradient is gone over, 8·v·d bytes beside 6·v·d FLOPs for each token: the more
    tokens, the less that costs; the fewer, the less memory their softmaxes take.
    """
    return max(PART_ROWS.get(weight.device.type, PART_ROWS["other"]), weight.shape[1] // 2)


@lru_cache
def in_place(device: str, dtype: torch.dtype) -> bool:
    """Whether a softmax may replace what it is of. torch does not promise it, so it is tried."""
    if device != "cpu":
        return False
    x = torch.linspace(-9, 9, 3 * 4099, dtype=dtype).sin().view(3, -1)
    return torch.equal(torch.softmax(x, dim=1), torch.softmax(x, dim=1, out=x))


def fold(
    block: Float[Tensor, "r w"],
    local: Int[Tensor, "r"],
    bias: Float[Tensor, "w"] | None,
    logit_scale: float,
    softcap: float | None,
    *,
    write: bool = False,
    moments: bool = False,
    total: Float[Tensor, "r"] | None = None,
    at_target: Float[Tensor, "r"] | None = None,
    out: Float[Tensor, "r w"] | None = None,
) -> Folded:
    """Fold a tile of raw products, as `Folded` says; `local` is the target's column, or -1.

    The softmax is written into `out`, if that is given.
    """
    x = block.to(accumulation_dtype(block.dtype))
    if bias is not None:
        x += bias
    if logit_scale != 1.0:
        x *= logit_scale
    slopes: Tensor | None = None
    if softcap is not None:
        x = x.div_(softcap).tanh_()
        if write or total is not None:
            slopes = x.square().neg_().add_(1.0).mul_(logit_scale)
        x *= softcap

    rows = (local >= 0).nonzero()[:, 0]
    columns = local[rows]
    own, slope = x.new_zeros(len(x)), x.new_zeros(len(x))
    own[rows] = x[rows, columns]
    steepness = 1.0 if softcap is None else 1.0 - (own[rows] / softcap).square()
    slope[rows] = logit_scale * steepness
    x[rows, columns] = -torch.inf

    highest = x.amax(dim=1)
    empty = highest == -torch.inf
    if out is None and not moments and in_place(x.device.type, x.dtype):
        out = x  # one tile at a time, and the C library need not look for room among smaller things
    p = torch.softmax(x, dim=1, out=out)
    lse = highest - p.amax(dim=1).log()  # the highest is 1 part in the sum
    if x.shape[1] == 1 or empty.any():
        p, lse = p.masked_fill_(empty[:, None], 0.0), lse.masked_fill(empty, -torch.inf)
    found = None
    if moments:
        below = (highest[:, None] - x).masked_fill_(x == -torch.inf, 0.0)
        entropy = ((p * below).sum(dim=1) + lse - highest).masked_fill(empty, 0.0)
        found = (entropy, p.square().sum(dim=1), highest)
    if slopes is not None:
        p *= slopes
    elif logit_scale != 1.0 and (write or total is not None):
        p *= logit_scale
    if total is not None and at_target is not None:
        p = against(p, lse, total, at_target, local, out=p)
    return Folded(p, lse, own, slope, found)


@jaxtyped(typechecker=beartype)
def token_log_probs(
    hidden: Float[Tensor, "t d"],
    weight: Float[Tensor, "v d"],
    targets: Int[Tensor, "t"],
    bias: Float[Tensor, "v"] | None,
    logit_scale: float,
    softcap: float | None,
    *,
    fold: Fold = fold,
    fused_loss: FusedLoss | None = None,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    """Log-probs, and then extras; further arguments as `Options` has them."""
    device = hidden.device.type
    options = Options(
        logit_scale=logit_scale,
        softcap=softcap,
        dtype=compute_dtype(hidden, weight),
        fold=fold,
        tile_bytes=TILE_BYTES.get(device, TILE_BYTES["other"]),
        keep_bytes=keep_bytes(weight),
        part_rows=part_rows(weight),
        differentiates=torch.is_grad_enabled(),
        **kwargs,
    )
    given = (hidden, weight, bias, targets, options)
    parts = split_for_fused_loss(fused_loss, *given)
    if parts is not None:
        return (FusedLossLogProbs.apply(*given, fused_loss, parts),)
    with torch.autocast(device, enabled=False):
        return TiledLogProbs.apply(*given)
