"""The tiled gather as an autograd Function, and the entry that all tiled backends share.

Forward computes all tiles. What it does beside depends on the gradients that are needed:

- none: nothing.
- of hidden alone (a frozen head): it computes d log-prob / d hidden, which backward multiplies by each
  token's gradient.
- of the head: it caches the tiles' softmaxes as far as there is room. Backward computes the other tiles
  again.
- of the head, where the loss is given: it computes the gradients, and backward returns them
  (`fused_backward`).

The memory beside inputs and gradients is one tile (two with extras), [t, d] and a few [t] in float32, and the
cached softmaxes.
"""

from collections.abc import Callable
from typing import Any

import torch
from beartype import beartype
from jaxtyping import Float, Int, jaxtyped
from torch import Tensor

from dpo_wrapper.log_probs.backward import forbid_double_backward, gradients_from_saved
from dpo_wrapper.log_probs.dtypes import compute_dtype
from dpo_wrapper.log_probs.forward import OnlineHiddenGrad, forward_tiles
from dpo_wrapper.log_probs.fused_backward import FusedLoss, FusedLossLogProbs, split_for_fused_loss
from dpo_wrapper.log_probs.softmax_cache import SoftmaxCache
from dpo_wrapper.log_probs.statistics import TileSoftmax, sum_over
from dpo_wrapper.log_probs.tiles import GatherOptions, Tiles


class TiledLogProbs(torch.autograd.Function):
    """Log-probs, and with `needs_extras` the `EXTRAS`, for gradients that are not known before backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: GatherOptions
    ) -> tuple[Tensor, ...]:
        tiles = Tiles(hidden, weight, bias, targets, options)
        needs_hidden, needs_weight, needs_bias = (
            needs_grad and options.needs_grad for needs_grad in ctx.needs_input_grad[:3]
        )
        needs_head = needs_weight or needs_bias
        ctx.has_hidden_grad = needs_hidden and not needs_head
        cache_bytes = SoftmaxCache.budget(weight) if needs_head else 0
        cache = SoftmaxCache(cache_bytes, len(targets) * len(weight), hidden.device, options.matmul_dtype)
        online_grad = OnlineHiddenGrad(tiles) if ctx.has_hidden_grad else None
        statistics = forward_tiles(tiles, cache, online_grad)

        ctx.options, ctx.cache, ctx.hidden_dtype = options, cache, hidden.dtype
        if online_grad is None:
            ctx.save_for_backward(hidden, weight, bias, targets, *statistics)
        else:
            hidden_grad = online_grad.rescale(statistics.lse).neg_()
            column = tiles.target_column(slice(None), slice(0, len(weight)))
            tokens = (column >= 0).nonzero()[:, 0]  # the others' targets are on another process
            target_weight = weight[column[tokens]].to(hidden_grad.dtype)
            hidden_grad[tokens] += target_weight * statistics.target_grad[tokens, None]
            ctx.save_for_backward(hidden_grad)
        extras = statistics.compute_extras() if options.needs_extras else ()
        ctx.mark_non_differentiable(*extras)
        return (statistics.log_probs, *extras)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward()
        if ctx.has_hidden_grad:
            (hidden_grad,) = ctx.saved_tensors
            hidden_grad = sum_over(hidden_grad * grad[:, None], ctx.options.vocab_group)
            return hidden_grad.to(ctx.hidden_dtype), None, None, None, None
        return *gradients_from_saved(ctx, ctx.saved_tensors, grad, ctx.cache), None, None


@jaxtyped(typechecker=beartype)
def token_log_probs(
    hidden: Float[Tensor, "t d"],
    weight: Float[Tensor, "v d"],
    targets: Int[Tensor, "t"],
    bias: Float[Tensor, "v"] | None,
    logit_scale: float,
    softcap: float | None,
    *,
    tile_softmax: Callable[..., TileSoftmax],
    fused_loss: FusedLoss | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Log-probs, followed by the `EXTRAS` where they are needed, with the tiles of one backend.

    Args:
        tile_softmax: the backend's function.
        fused_loss: the loss that the log-probs enter.
        options: further fields of `GatherOptions`.
    """
    gather_options = GatherOptions(
        logit_scale=logit_scale,
        softcap=softcap,
        matmul_dtype=compute_dtype(hidden, weight),
        tile_softmax=tile_softmax,
        needs_grad=torch.is_grad_enabled(),
        **options,
    )
    inputs = (hidden, weight, bias, targets, gather_options)
    chunks = split_for_fused_loss(fused_loss, *inputs)
    if chunks is not None:
        return (FusedLossLogProbs.apply(*inputs, fused_loss, chunks),)
    with torch.autocast(hidden.device.type, enabled=False):
        return TiledLogProbs.apply(*inputs)
