"""Tiles by torch's operations, on any device."""

from functools import lru_cache, partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_wrapper.log_probs import tiled
from dpo_wrapper.log_probs.backend import MAX_LOG_WEIGHT, RawTile, ReducedTile, TileBackend, exp_difference
from dpo_wrapper.log_probs.dtypes import accumulation_dtype
from dpo_wrapper.log_probs.statistics import OnlineSoftmax


@lru_cache
def is_softmax_in_place(device: str, dtype: torch.dtype) -> bool:
    """Whether `torch.softmax` may overwrite its input. torch does not promise it, so it is tried."""
    if device != "cpu":
        return False
    x = torch.linspace(-9, 9, 3 * 4099, dtype=dtype).sin().view(3, -1)
    return torch.equal(torch.softmax(x, dim=1), torch.softmax(x, dim=1, out=x))


class TorchBackend(TileBackend):
    def entry_bytes(self, matmul_dtype: torch.dtype) -> int:
        return sum(dtype.itemsize for dtype in {matmul_dtype, accumulation_dtype(matmul_dtype)})

    def reduce(
        self,
        raw: RawTile,
        statistics: OnlineSoftmax,
        *,
        needs_moments: bool = False,
        needs_tile: bool = False,
        reference_lse: Float[Tensor, "r"] | None = None,
        out: Float[Tensor, "r w"] | None = None,
    ) -> ReducedTile:
        needs_slopes = needs_tile or reference_lse is not None
        softmax = tile_softmax(raw, needs_slopes, out, is_in_place=not needs_moments)
        p, lse = softmax.p, softmax.lse
        moments = None
        if needs_moments:
            x, max_logit = softmax.logits, softmax.max_logit
            below_max = (max_logit[:, None] - x).masked_fill_(x == -torch.inf, 0.0)
            entropy = ((p * below_max).sum(dim=1) + lse - max_logit).masked_fill(lse == -torch.inf, 0.0)
            moments = (entropy, p.square().sum(dim=1), max_logit)
        statistics.update(lse, softmax.target_logit, softmax.target_slope, moments)
        if needs_slopes:
            softmax.multiply_by_slopes(raw.logit_scale)
        if reference_lse is None:
            return ReducedTile(p, lse)

        rescale = None
        is_above = lse > reference_lse + MAX_LOG_WEIGHT
        if lse.device.type != "cpu" or is_above.any():
            raised = lse.where(is_above, reference_lse)
            rescale = exp_difference(reference_lse, raised)
            reference_lse.copy_(raised)
        return ReducedTile(p.mul_(exp_difference(lse, reference_lse)[:, None]), rescale=rescale)

    def write_grad(
        self,
        raw: RawTile,
        tile_lse: Float[Tensor, "r"] | None,
        lse: Float[Tensor, "r"],
        target_grad: Float[Tensor, "r"],
    ) -> Float[Tensor, "r w"]:
        p = raw.product
        if tile_lse is None:
            softmax = tile_softmax(raw, needs_slopes=True)
            softmax.multiply_by_slopes(raw.logit_scale)
            p, tile_lse = softmax.p, softmax.lse
        p.mul_((tile_lse - lse).exp().to(p.dtype)[:, None])
        is_held, column = raw.locate_targets()
        at_target = -target_grad[:, None].to(p.dtype)
        return p.scatter_(1, column[:, None], at_target.where(is_held[:, None], p.gather(1, column[:, None])))


class TileSoftmax(NamedTuple):
    """The softmax over a tile's entries without the target, in the dtype of sums."""

    p: Float[Tensor, "r w"]
    """0 at targets, and where there is no other entry."""
    lse: Float[Tensor, "r"]
    """Log-sum-exp of the same entries; -inf where there is none."""
    target_logit: Float[Tensor, "r"]
    target_slope: Float[Tensor, "r"]
    """0 where the tile does not hold the target, as the logit."""
    max_logit: Float[Tensor, "r"]
    logits: Float[Tensor, "r w"]
    """With -inf at targets; overwritten by `p` if in place."""
    slopes: Float[Tensor, "r w"] | None

    def multiply_by_slopes(self, logit_scale: float) -> None:
        """Multiply `p` by its slopes in place; without a softcap they are all the `logit_scale`."""
        if self.slopes is not None:
            self.p.mul_(self.slopes)
        elif logit_scale != 1.0:
            self.p.mul_(logit_scale)


def tile_softmax(
    raw: RawTile, needs_slopes: bool, out: Tensor | None = None, is_in_place: bool = True
) -> TileSoftmax:
    """The softmax of a tile, written to `out` if it has the dtype of sums, else if possible in place."""
    x = raw.product.to(accumulation_dtype(raw.product.dtype))
    if raw.bias is not None:
        x += raw.bias
    if raw.logit_scale != 1.0:
        x *= raw.logit_scale
    slopes: Tensor | None = None
    if raw.softcap is not None:
        x = x.div_(raw.softcap).tanh_()
        if needs_slopes:
            slopes = x.square().neg_().add_(1.0).mul_(raw.logit_scale)
        x *= raw.softcap

    is_held, column = raw.locate_targets()
    at_column = x.gather(1, column[:, None])
    target_logit = at_column[:, 0].where(is_held, 0.0)
    target_slope = raw.logit_scale * is_held.to(x.dtype)
    if raw.softcap is not None:
        target_slope *= 1.0 - (target_logit / raw.softcap).square()
    x.scatter_(1, column[:, None], at_column.masked_fill_(is_held[:, None], -torch.inf))

    max_logit = x.amax(dim=1)
    is_empty = max_logit == -torch.inf
    if out is not None and out.dtype != x.dtype:
        out = None  # the softmax is computed wider, and the cache narrows it
    if out is None and is_in_place and is_softmax_in_place(x.device.type, x.dtype):
        out = x  # no second tile, for which the C library would search its free memory
    p = torch.softmax(x, dim=1, out=out)
    lse = max_logit - p.amax(dim=1).log()  # the highest logit's share of the sum is 1
    # an accelerator would have to wait for the answer
    if x.device.type != "cpu" or x.shape[1] == 1 or is_empty.any():
        p, lse = p.masked_fill_(is_empty[:, None], 0.0), lse.masked_fill(is_empty, -torch.inf)
    return TileSoftmax(p, lse, target_logit, target_slope, max_logit, x, slopes)


token_log_probs = partial(tiled.token_log_probs, backend=TorchBackend())
