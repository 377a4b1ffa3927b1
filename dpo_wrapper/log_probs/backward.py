"""The gradients of log-probs, from tiles that forward has cached or that are computed again."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_wrapper.cpu_matmul import add_matmul
from dpo_wrapper.log_probs.softmax_cache import SoftmaxCache
from dpo_wrapper.log_probs.statistics import OnlineSoftmax, sum_over
from dpo_wrapper.log_probs.tiles import Tiles

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of hidden states, weight and bias; None for those that need none."""


def compute_gradients(
    tiles: Tiles,
    needs_grad: Sequence[bool],
    grad: Float[Tensor, "t"],
    statistics: OnlineSoftmax,
    cache: SoftmaxCache,
    head_grads: tuple[Tensor | None, Tensor | None] = (None, None),
    needs_sums: bool = False,
) -> Gradients:
    """The gradients of hidden, weight and bias, each if `needs_grad` says so, from that of the log-probs.

    The gradient of each slice of the weight is summed over all tokens, in float32 or wider, and then rounded
    to the weight's dtype. Where that is as wide, or there is one product and nothing to sum, it is written in
    place. With `needs_sums` those of the head are returned in the dtype of sums; given as `head_grads`, they
    are added to in place.
    """
    options, (needs_hidden, needs_weight, needs_bias) = tiles.options, needs_grad
    hidden, weight, bias = tiles.hidden, tiles.weight, tiles.bias
    dtype, sum_dtype = options.matmul_dtype, options.accumulation_dtype
    lse, target_grad = statistics.lse, statistics.target_grad
    weight_grad, bias_grad = head_grads
    is_new = weight_grad is None and bias_grad is None
    if is_new:
        new_like = torch.empty_like if tiles.token_slices else torch.zeros_like
        new_like = partial(new_like, dtype=sum_dtype if needs_sums else None)
        weight_grad = new_like(weight) if needs_weight else None
        bias_grad = new_like(bias) if needs_bias and bias is not None else None
    new_hidden_grad = torch.empty_like if tiles.vocab_slices else torch.zeros_like  # it may have no entry
    hidden_grad = new_hidden_grad(hidden, dtype=sum_dtype) if needs_hidden else None
    weighted_hidden = (hidden * -grad[:, None]).to(dtype) if needs_weight else None
    for vocab_slice in tiles.vocab_slices:
        weight_out = weight_sum = None if weight_grad is None else weight_grad[vocab_slice]
        if weight_out is not None and weight_out.dtype != sum_dtype and len(tiles.token_slices) > 1:
            weight_sum = torch.empty_like(weight_out, dtype=sum_dtype)
        bias_sum = None if bias_grad is None else tiles.zeros(vocab_slice.stop - vocab_slice.start)
        for token_slice in tiles.token_slices:
            cached, tile_lse = cache.pop()
            if cached is None:
                raw = tiles.multiply(token_slice, vocab_slice)
            else:
                raw = tiles.as_tile(cached, token_slice, vocab_slice)
            tile = options.backend.write_grad(raw, tile_lse, lse[token_slice], target_grad[token_slice])
            matmul_tile = tile.to(dtype)
            if hidden_grad is not None:
                beta = 0.0 if vocab_slice.start == 0 else 1.0
                add_matmul(hidden_grad[token_slice], matmul_tile, tiles.matmul_weight(vocab_slice), beta)
            if weight_sum is not None and weighted_hidden is not None:
                beta = 0.0 if is_new and token_slice.start == 0 else 1.0
                add_matmul(weight_sum, matmul_tile.T, weighted_hidden[token_slice], beta)
            if bias_sum is not None:
                bias_sum.sub_(grad[token_slice] @ tile.to(sum_dtype))
            del cached, raw, tile, matmul_tile  # free this tile before the next is computed
        if weight_out is not None and weight_sum is not None and weight_out is not weight_sum:
            weight_out.copy_(weight_sum)
        if bias_grad is not None and bias_sum is not None:
            bias_grad[vocab_slice] = bias_sum if is_new else bias_sum.add_(bias_grad[vocab_slice])
    if hidden_grad is not None:
        hidden_grad = sum_over(hidden_grad.mul_(-grad[:, None]), options.vocab_group).to(hidden.dtype)
    return hidden_grad, weight_grad, bias_grad


def gradients_from_saved(
    ctx: Any, saved: Sequence[Tensor], grad: Tensor, cache: SoftmaxCache | None
) -> Gradients:
    """The gradients in a backward pass, from the inputs and statistics that forward has saved."""
    hidden, weight, bias, targets, statistics = saved
    with torch.autocast(hidden.device.type, enabled=False):
        tiles = Tiles(hidden, weight, bias, targets, ctx.options)
        cache = cache or SoftmaxCache(tiles, max_bytes=0)
        return compute_gradients(tiles, ctx.needs_input_grad[:3], grad, OnlineSoftmax(statistics), cache)


def forbid_double_backward(alternative: str) -> None:
    """Raise RuntimeError where backward is to be differentiated itself (`create_graph=True`)."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"log-probs should be differentiated once, but create_graph is True: use {alternative}."
        )
