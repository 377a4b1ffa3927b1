"""Gradients that are computed in the forward pass, for log-probs that enter a known loss.

Forward works on a chunk of the tokens at a time: their log-probs, the gradient of the loss for them, and
their share of the gradients of hidden states and head. It keeps the softmaxes of one chunk only, and computes
each product once: 3 in all. A chunk consists of whole groups, such as the tokens of one preference pair,
because the loss's gradient for a token depends on the log-probs of its group.

Backward compares the gradient that arrives with the predicted one. If it is a multiple of it (by the share of
a micro-batch, or a scaler's factor), the gradients are multiplied likewise. If not, they are computed again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dpo_wrapper.log_probs.backward import compute_gradients, forbid_double_backward, gradients_from_saved
from dpo_wrapper.log_probs.forward import forward_tiles
from dpo_wrapper.log_probs.softmax_cache import SoftmaxCache, cache_room
from dpo_wrapper.log_probs.statistics import OnlineSoftmax
from dpo_wrapper.log_probs.tiles import GatherOptions, Tiles, TokenIndex


@dataclass(frozen=True)
class FusedLoss:
    """The loss that log-probs enter.

    Args:
        fn: a function from Float[t], the log-probs as `token_log_probs` returns them, to Float[]. It is
            called several times, with -1 for log-probs that are not computed yet, and should be
            deterministic.
        groups: Int[t], the number of each token's group. The loss's gradient for a token should depend on the
            log-probs of its own group alone, as those of one preference pair. Without it all tokens are one
            group.

    Raises:
        TypeError: `fn` is no function, or `groups` is no int64 tensor of one dimension.
    """

    fn: Callable[[Tensor], Tensor]
    groups: Int[Tensor, "t"] | None = None

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"fn of FusedLoss should be a function, but it is {self.fn!r}.")
        if self.groups is not None and (self.groups.ndim != 1 or self.groups.dtype != torch.int64):
            raise TypeError(
                "groups of FusedLoss should be an int64 tensor of one dimension, but it is "
                f"{self.groups.dtype} of {self.groups.ndim}: give one number for each log-prob."
            )

    def split(self, max_tokens: int, device: torch.device) -> list[TokenIndex]:
        """Split the tokens into chunks of whole groups, of at most `max_tokens` unless a group has more.

        Chunks are computed where `groups` are, without a wait if that is the CPU, and moved to `device`.
        """
        if self.groups is None or len(self.groups) <= max_tokens:
            return [slice(None)]
        _, group, sizes = torch.unique(self.groups, return_inverse=True, return_counts=True)
        chunk_of_group, chunk, chunk_size = [], 0, 0
        for size in sizes.tolist():
            if chunk_size and chunk_size + size > max_tokens:
                chunk, chunk_size = chunk + 1, 0
            chunk_of_group.append(chunk)
            chunk_size += size
        chunk_of_token = torch.tensor(chunk_of_group, device=group.device)[group]
        chunks = chunk_of_token.argsort(stable=True).split(torch.bincount(chunk_of_token).tolist())
        return [chunk.to(device, non_blocking=True) for chunk in chunks] if len(chunks) > 1 else [slice(None)]

    def compute_grad(self, log_probs: Float[Tensor, "t"]) -> Float[Tensor, "t"]:
        """The gradient of the loss for the log-probs."""
        # without the hooks of a checkpoint around this call, which would run it again
        without_hooks = saved_tensors_hooks(lambda x: x, lambda x: x)
        with torch.enable_grad(), without_hooks:
            leaf = log_probs.detach().clone().requires_grad_()
            loss = self.fn(leaf)
            if not (isinstance(loss, Tensor) and loss.ndim == 0):
                raise ValueError(
                    "fn of FusedLoss should return a tensor without dimensions, but it returned "
                    f"{tuple(loss.shape) if isinstance(loss, Tensor) else loss!r}: sum over the log-probs."
                )
            if not loss.requires_grad:
                return torch.zeros_like(leaf)
            (grad,) = torch.autograd.grad(loss, leaf, materialize_grads=True)
        return grad


def proportionality(grad: Float[Tensor, "t"], predicted_grad: Float[Tensor, "t"]) -> float | None:
    """The factor c in `grad = c * predicted_grad`, up to rounding; None if there is none."""
    largest = predicted_grad.abs().argmax(dim=0, keepdim=True)
    (largest_grad,), (largest_predicted,) = grad[largest], predicted_grad[largest]
    scale = (largest_grad / largest_predicted).where(largest_predicted != 0, 1.0)
    eps = torch.finfo(grad.dtype).eps
    tolerance = 64 * eps * grad.abs() + 8 * eps * largest_grad.abs()
    is_proportional = ((grad - scale * predicted_grad).abs() <= tolerance).all()
    # NaN stands for none, so that an accelerator has to be waited for once
    factor = scale.masked_fill(~is_proportional, torch.nan).item()
    return None if math.isnan(factor) else factor


def max_chunk_tokens(weight: Float[Tensor, "v d"], matmul_dtype: torch.dtype, sum_bytes: int = 0) -> int:
    """The most tokens in a chunk, unless one group has more.

    Each chunk reads and writes the head's gradient, 8·v·d bytes beside 6·v·d FLOPs for each of its tokens.
    Larger chunks make that matter less; smaller ones need less memory for their tiles. On an accelerator they
    are as large as the room for tiles allows, from which `sum_bytes` are taken.
    """
    if weight.device.type == "cpu":
        return max(512, weight.shape[1] // 2)
    room = cache_room(weight) - sum_bytes
    return max(2048, weight.shape[1] // 2, room // (len(weight) * matmul_dtype.itemsize))


def split_for_fused_loss(fused_loss: FusedLoss | None, tiles: Tiles) -> list[TokenIndex] | None:
    """The chunks whose gradients forward computes; None where it should not use the loss.

    - There is no loss, no gradient, or no token, or the head is frozen, whose gradient needs no loss.
    - With extras, or with a `vocab_group`, whose processes would not agree on chunks.
    - In float16 gradients need a scaler's factor before they are rounded.
    - The gradient of a head narrower than float32 is summed over chunks in float32, and there is no room for
      that beside the tiles of a chunk; or there is room for all tiles, with which no sum is needed.
    """
    options, weight = tiles.options, tiles.weight
    trained = [x for x in (weight, tiles.bias) if x is not None and x.requires_grad]
    if fused_loss is None or not trained or not len(tiles.targets) or not options.needs_grad:
        return None
    dtypes = {options.matmul_dtype, tiles.hidden.dtype, *(x.dtype for x in trained)}
    if options.needs_extras or options.vocab_group is not None or torch.float16 in dtypes:
        return None
    device, dtype = weight.device, options.matmul_dtype
    chunks = fused_loss.split(max_chunk_tokens(weight, dtype), device)
    if len(chunks) == 1 or all(x.dtype == options.accumulation_dtype for x in trained):
        return chunks
    sum_bytes = weight.numel() * options.accumulation_dtype.itemsize
    max_tokens, room = max_chunk_tokens(weight, dtype, sum_bytes), cache_room(weight)
    if tiles.num_bytes() <= room or sum_bytes + max_tokens * len(weight) * dtype.itemsize > room:
        return None
    return fused_loss.split(max_tokens, device)


class FusedLossLogProbs(torch.autograd.Function):
    """Log-probs whose gradients forward computes, for the loss that they enter."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: GatherOptions,
        fused_loss: FusedLoss,
        chunks: list[TokenIndex],
    ) -> Tensor:
        needs_grad, dtype = ctx.needs_input_grad[:3], options.accumulation_dtype
        # the head is cast once, not for each chunk
        matmul_weight = weight if len(chunks) == 1 else weight.to(options.matmul_dtype)
        all_tiles = Tiles(hidden, matmul_weight, bias, targets, options)
        all_statistics = OnlineSoftmax.initial(len(targets), hidden.device, dtype)
        log_probs = all_tiles.zeros(len(targets)).fill_(-1.0)
        predicted_grad = all_tiles.zeros(len(targets))
        hidden_grad = torch.empty_like(hidden) if needs_grad[0] else None
        weight_grad: Tensor | None = None
        bias_grad: Tensor | None = None
        chunk_numel = max_chunk_tokens(weight, options.matmul_dtype) * len(weight)
        chunk_bytes = chunk_numel * options.matmul_dtype.itemsize
        buffer = None  # on the CPU, memory that the tiles of all chunks use in turn
        if len(chunks) > 1 and hidden.device.type == "cpu":
            buffer = torch.empty(chunk_numel, dtype=options.matmul_dtype, device=hidden.device)
        for chunk in chunks:
            tiles = all_tiles.select(chunk)
            # a larger chunk, of one group, has memory of its own, which backward frees tile by tile
            fits = len(tiles.targets) * len(weight) <= chunk_numel
            max_bytes = max(SoftmaxCache.budget(tiles), chunk_bytes)
            cache = SoftmaxCache(tiles, max_bytes, buffer if fits else None)
            with torch.autocast(hidden.device.type, enabled=False):
                statistics = forward_tiles(tiles, cache)
            all_statistics.values[:, chunk] = statistics.values
            log_probs[chunk] = statistics.log_probs
            # under the caller's autocast, as the loss itself will be
            predicted_grad[chunk] = fused_loss.compute_grad(log_probs)[chunk]
            with torch.autocast(hidden.device.type, enabled=False):
                chunk_grad, weight_grad, bias_grad = compute_gradients(
                    tiles,
                    needs_grad,
                    predicted_grad[chunk],
                    statistics,
                    cache,
                    (weight_grad, bias_grad),
                    needs_sums=len(chunks) > 1,
                )
            if hidden_grad is not None and chunk_grad is not None:
                hidden_grad[chunk] = chunk_grad
            all_tiles.buffer = tiles.buffer
        all_tiles.buffer = None  # before the sums are narrowed
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight.dtype)
        if bias_grad is not None and bias is not None:
            bias_grad = bias_grad.to(bias.dtype)
        ctx.options, ctx.grads = options, (hidden_grad, weight_grad, bias_grad)
        ctx.save_for_backward(hidden, weight, bias, targets, all_statistics.values, predicted_grad)
        return log_probs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward("impl = 'eager' (log_prob_impl of DPO)")
        *saved, predicted_grad = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None  # autograd need not copy what nobody else holds
        scale = None if grads is None else proportionality(grad, predicted_grad)
        if scale is None:
            del grads  # before others are computed
            grads = gradients_from_saved(ctx, saved, grad, None)
        elif scale != 1.0:
            for gradient in filter(torch.is_tensor, grads):
                gradient.mul_(scale)
        return *grads, None, None, None, None
