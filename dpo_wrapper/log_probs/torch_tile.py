"""The softmax of a tile by torch's operations, on any device."""

from functools import lru_cache, partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpo_wrapper.log_probs import tiled
from dpo_wrapper.log_probs.backward import negative_logit_grad
from dpo_wrapper.log_probs.dtypes import accumulation_dtype
from dpo_wrapper.log_probs.statistics import TileSoftmax


@lru_cache
def is_softmax_in_place(device: str, dtype: torch.dtype) -> bool:
    """Whether `torch.softmax` may overwrite its input. torch does not promise it, so it is tried."""
    if device != "cpu":
        return False
    x = torch.linspace(-9, 9, 3 * 4099, dtype=dtype).sin().view(3, -1)
    return torch.equal(torch.softmax(x, dim=1), torch.softmax(x, dim=1, out=x))


def tile_softmax(
    tile: Float[Tensor, "r w"],
    target_column: Int[Tensor, "r"],
    bias: Float[Tensor, "w"] | None,
    logit_scale: float,
    softcap: float | None,
    *,
    needs_softmax: bool = False,
    needs_moments: bool = False,
    lse: Float[Tensor, "r"] | None = None,
    target_grad: Float[Tensor, "r"] | None = None,
    out: Float[Tensor, "r w"] | None = None,
) -> TileSoftmax:
    """The softmax of a tile of raw products `hidden @ weight.T`, which it may overwrite.

    `target_column` is -1 where the tile does not hold the target. `TileSoftmax.tile` is written to `out`, in
    the dtype of sums, and is valid only if `needs_softmax` or with the `lse` of the whole vocabulary. Then it
    is minus d log-prob / d raw product, whose value at the target is minus `target_grad`.
    """
    needs_tile = needs_softmax or lse is not None
    x = tile.to(accumulation_dtype(tile.dtype))
    if bias is not None:
        x += bias
    if logit_scale != 1.0:
        x *= logit_scale
    slopes: Tensor | None = None
    if softcap is not None:
        x = x.div_(softcap).tanh_()
        if needs_tile:
            slopes = x.square().neg_().add_(1.0).mul_(logit_scale)
        x *= softcap

    tokens = (target_column >= 0).nonzero()[:, 0]
    columns = target_column[tokens]
    target_logit, target_slope = x.new_zeros(len(x)), x.new_zeros(len(x))
    target_logit[tokens] = x[tokens, columns]
    cap_slope = 1.0 if softcap is None else 1.0 - (target_logit[tokens] / softcap).square()
    target_slope[tokens] = logit_scale * cap_slope
    x[tokens, columns] = -torch.inf

    max_logit = x.amax(dim=1)
    is_empty = max_logit == -torch.inf
    if out is None and not needs_moments and is_softmax_in_place(x.device.type, x.dtype):
        out = x  # no second tile, for which the C library would search its free memory
    p = torch.softmax(x, dim=1, out=out)
    tile_lse = max_logit - p.amax(dim=1).log()  # the highest logit's share of the sum is 1
    if x.shape[1] == 1 or is_empty.any():
        p, tile_lse = p.masked_fill_(is_empty[:, None], 0.0), tile_lse.masked_fill(is_empty, -torch.inf)
    moments = None
    if needs_moments:
        below_max = (max_logit[:, None] - x).masked_fill_(x == -torch.inf, 0.0)
        entropy = ((p * below_max).sum(dim=1) + tile_lse - max_logit).masked_fill(is_empty, 0.0)
        moments = (entropy, p.square().sum(dim=1), max_logit)
    if slopes is not None:
        p *= slopes
    elif logit_scale != 1.0 and needs_tile:
        p *= logit_scale
    if lse is not None and target_grad is not None:
        p = negative_logit_grad(p, tile_lse, lse, target_grad, target_column)
    return TileSoftmax(p, tile_lse, target_logit, target_slope, moments)


token_log_probs = partial(tiled.token_log_probs, tile_softmax=tile_softmax)
