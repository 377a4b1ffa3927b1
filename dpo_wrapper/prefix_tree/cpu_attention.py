"""Plain attention over a prefix tree on the CPU, branch by branch: nothing expanded, nothing computed twice.

A branch is a stretch of the tree in which each token follows the one before it, and its past is where the
tokens before its first stand:

    tree      a  b  c  d  x  y  |  e  f
    branches  [a  b  c  d][x  y] [e  f]          the past of [x y] is [a b]

The queries of a branch see their own branch causally and all of its past. torch's kernel computes each of the
two and says what its softmax was divided by; the two outputs are then one softmax's, weighted by that. Its
backward takes outputs and divisors as given, so that of the whole it makes each part's share of the gradients
(as in ring attention, Liu et al. 2023, arXiv 2310.01889).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

Branch = tuple[slice, tuple[slice, ...]]
"""Where a branch stands, and its past."""

LEAST = 2**15
"""Mean length of branches, times the width of all heads together, below which the many small calls cost more
than they save."""


def branches_of(position: Int[Tensor, "u"]) -> tuple[Branch, ...]:
    """The branches of a tree whose tokens stand in depth-first order at these depths."""
    u = len(position)
    starts = [0, *((position.diff() != 1).nonzero()[:, 0] + 1).tolist(), u] if u else []
    branches: list[Branch] = []
    trail: list[slice] = []  # of the branch before, its own place included
    for start, end in pairwise(starts):
        past, missing = [], int(position[start])
        for piece in trail:
            taken = min(missing, piece.stop - piece.start)
            if taken:
                past.append(slice(piece.start, piece.start + taken))
            missing -= taken
        branches.append((slice(start, end), tuple(past)))
        trail = [*past, slice(start, end)]
    return tuple(branches)


def mean_length(branches: Sequence[Branch]) -> float:
    return branches[-1][0].stop / len(branches) if branches else 0.0


class BranchAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Float[Tensor, "1 h w d"],
        k: Float[Tensor, "1 h w d"],
        v: Float[Tensor, "1 h w d"],
        branches: tuple[Branch, ...],
        scale: float | None,
    ) -> Float[Tensor, "1 h w d"]:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out = unfilled(q, q.dtype)
        divisor = torch.zeros(out.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
        out[:, :, branches[-1][0].stop :] = 0.0
        for own, past in branches:
            mine = [t[:, :, own] for t in (q, k, v)]
            part, total = kernel(*mine, is_causal=True, scale=scale)
            if past:
                other, log_sum = kernel(mine[0], joined(k, past), joined(v, past), scale=scale)
                both = torch.logaddexp(total, log_sum)
                part = part * (total - both).exp()[..., None] + other * (log_sum - both).exp()[..., None]
                total = both
            out[:, :, own], divisor[:, :, own] = part, total
        ctx.save_for_backward(q, k, v, out, divisor)
        ctx.branches, ctx.scale = branches, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        q, k, v, out, divisor = ctx.saved_tensors
        grads = [unfilled(t, torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v)]
        for total in grads:
            total[:, :, ctx.branches[-1][0].stop :] = 0.0
        for own, past in ctx.branches:
            given, mine, whole = grad[:, :, own], q[:, :, own], (out[:, :, own], divisor[:, :, own])
            shares = kernel(given, mine, k[:, :, own], v[:, :, own], *whole, 0.0, True, scale=ctx.scale)
            for total, share in zip(grads, shares, strict=True):
                total[:, :, own] = share  # before any branch below has added its own
            if past:
                keys, values = joined(k, past), joined(v, past)
                first, *shares = kernel(given, mine, keys, values, *whole, 0.0, False, scale=ctx.scale)
                grads[0][:, :, own] += first
                sizes = [place.stop - place.start for place in past]
                for total, share in zip(grads[1:], shares, strict=True):
                    for place, piece in zip(past, share.split(sizes, dim=2), strict=True):
                        total[:, :, place] += piece
        return *(total.to(q.dtype) for total in grads), None, None


def unfilled(like: Float[Tensor, "1 h w d"], dtype: torch.dtype) -> Float[Tensor, "1 h w d"]:
    """Laid out token by token, as the layers of a model take it next."""
    return like.new_empty(like.transpose(1, 2).shape, dtype=dtype).transpose(1, 2)


def joined(tokens: Float[Tensor, "1 h w d"], places: Sequence[slice]) -> Float[Tensor, "1 h n d"]:
    parts = [tokens[:, :, place] for place in places]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def branch_attend(
    q: Float[Tensor, "1 h w d"],
    k: Float[Tensor, "1 g w d"],
    v: Float[Tensor, "1 g w d"],
    branches: tuple[Branch, ...],
    scale: float | None,
) -> Float[Tensor, "1 h w d"]:
    """Softmax attention of the tokens of a tree, with as many heads of keys and values as divide those of the
    queries. Places behind the last branch get zeros."""
    if (times := q.shape[1] // k.shape[1]) > 1:
        k, v = (t.repeat_interleave(times, dim=1) for t in (k, v))
    return BranchAttention.apply(q, k, v, branches, scale)
