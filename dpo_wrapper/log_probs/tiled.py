"""The tiled gather as an autograd Function, and the entry that all tiled backends share.

Forward computes all tiles. What it does beside depends on the gradients that are needed:

- none: nothing.
- of hidden alone (a frozen head): it computes d log-prob / d hidden, which backward multiplies by each
  token's gradient.
- of the head: it caches softmaxes as far as there is room, and backward computes the other tiles again.
- of the head, where the loss is given: it computes the gradients themselves (`fused_backward`).
"""

from typing import Any

import torch
from beartype import beartype
from jaxtyping import Float, Int, jaxtyped
from torch import Tensor

from dpo_wrapper.log_probs.backend import TileBackend
from dpo_wrapper.log_probs.backward import forbid_double_backward, gradients_from_saved
from dpo_wrapper.log_probs.dtypes import compute_dtype
from dpo_wrapper.log_probs.forward import OnlineHiddenGrad, forward_tiles
from dpo_wrapper.log_probs.fused_backward import FusedLoss, FusedLossLogProbs, split_for_fused_loss
from dpo_wrapper.log_probs.softmax_cache import SoftmaxCache
from dpo_wrapper.log_probs.statistics import sum_over
from dpo_wrapper.log_probs.tiles import GatherOptions, Tiles


class TiledLogProbs(torch.autograd.Function):
    """Log-probs, and with `needs_extras` the `EXTRAS`, for gradients that are not known before backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: GatherOptions
    ) -> tuple[Tensor, ...]:
        tiles = Tiles(hidden, weight, bias, targets, options)
        needs_hidden, *needs_head = ctx.needs_input_grad[:3]
        is_trained = options.needs_grad and any(needs_head)
        cache = SoftmaxCache(tiles, SoftmaxCache.budget(tiles) if is_trained else 0)
        ctx.has_hidden_grad = options.needs_grad and needs_hidden and not is_trained
        online_grad = OnlineHiddenGrad(tiles) if ctx.has_hidden_grad else None
        statistics = forward_tiles(tiles, cache, online_grad)
        ctx.options, ctx.cache, ctx.hidden_dtype = options, cache, hidden.dtype
        if online_grad is None:
            ctx.save_for_backward(hidden, weight, bias, targets, statistics.values)
        else:
            ctx.save_for_backward(online_grad.log_prob_grad(statistics))
        extras = statistics.compute_extras() if options.needs_extras else ()
        ctx.mark_non_differentiable(*extras)
        return (statistics.log_probs, *extras)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward("impl = 'eager' (log_prob_impl of DPO)")
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
    backend: TileBackend,
    fused_loss: FusedLoss | None = None,
    **further_options: Any,
) -> tuple[Tensor, ...]:
    """Log-probs, followed by the `EXTRAS` where `needs_extras`, with the tiles of one backend."""
    dtype, needs_grad = compute_dtype(hidden, weight), torch.is_grad_enabled()
    options = GatherOptions(logit_scale, softcap, dtype, backend, needs_grad, **further_options)
    arguments = (hidden, weight, bias, targets, options)
    chunks = split_for_fused_loss(fused_loss, Tiles(*arguments))
    if chunks is not None:
        return (FusedLossLogProbs.apply(*arguments, fused_loss, chunks),)
    with torch.autocast(hidden.device.type, enabled=False):
        return TiledLogProbs.apply(*arguments)
