"""Softmax attention over a prefix tree on the CPU, branch by branch: no token is copied or computed twice.

A branch is a run of tokens in the tree of which each is the child of the one before it. Its prefix is the
rest of the path, from the root to the parent of its first token:

    tree      a  b  c  d  x  y  |  e  f
    branches  [a  b  c  d][x  y] [e  f]          the prefix of [x y] is [a b]

A query attends to the tokens of its branch causally, and to the whole prefix. torch's flash-attention kernel
computes each of the two with its log-sum-exp (lse), and the two outputs are joined to the output of one
softmax:

    lse = log(exp(lse_1) + exp(lse_2))        out = exp(lse_1 - lse) · out_1 + exp(lse_2 - lse) · out_2

The kernel's backward takes `out` and `lse` as arguments. Given those of the whole softmax, it returns the
share of one part of the keys in the gradients. Ring attention does the same for the parts of a sequence on
several devices (Liu et al. 2023, arXiv 2310.01889).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

Branch = tuple[slice, tuple[slice, ...]]
"""The tokens of a branch and those of its prefix, as slices of the tree's tokens."""

MIN_BRANCH_NUMEL = 2**13
"""The mean number of elements (tokens x heads x width) in the queries of one branch, below which the many
small kernel calls cost more time than they save."""


def find_branches(position: Int[Tensor, "u"]) -> tuple[Branch, ...]:
    """Find the branches of a tree from the depths of its tokens, which are in depth-first order."""
    depth = position.numpy()
    starts = np.flatnonzero(np.diff(depth, prepend=depth[:1]) != 1).tolist()
    branches: list[Branch] = []
    current_path: list[slice] = []  # from the root to the end of the branch before
    for start, end in pairwise([*starts, len(position)]):
        prefix, missing = [], int(depth[start])
        for run in current_path:
            length = min(missing, run.stop - run.start)
            if length:
                prefix.append(slice(run.start, run.start + length))
            missing -= length
        branches.append((slice(start, end), tuple(prefix)))
        current_path = [*prefix, slice(start, end)]
    return tuple(branches)


def attend_by_branch(
    q: Float[Tensor, "1 h w d"],
    k: Float[Tensor, "1 g w d"],
    v: Float[Tensor, "1 g w d"],
    branches: tuple[Branch, ...],
    scale: float | None,
) -> Float[Tensor, "1 h w d"]:
    """Compute softmax attention over a tree; tokens after the last branch are padding, with outputs of zeros.

    Equal to `F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)` with
    `mask[q, k] = k <= q < subtree_end[k]`.
    """
    if (repeats := q.shape[1] // k.shape[1]) > 1:
        k, v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
    return BranchAttention.apply(q, k, v, branches, scale)


class BranchAttention(torch.autograd.Function):
    """`attend_by_branch` for as many heads in keys and values as in queries; once differentiable."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, branches: tuple[Branch, ...], scale: float | None
    ) -> Tensor:
        flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out = zero_heads(q, q.dtype)
        lse = q.new_zeros(out.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
        for branch, prefix in branches:
            q_branch, k_branch, v_branch = (t[:, :, branch] for t in (q, k, v))
            out_branch, lse_branch = flash_attention(
                q_branch, k_branch, v_branch, is_causal=True, scale=scale
            )
            if prefix:
                k_prefix, v_prefix = gather_slices(k, prefix), gather_slices(v, prefix)
                out_prefix, lse_prefix = flash_attention(q_branch, k_prefix, v_prefix, scale=scale)
                lse_both = torch.logaddexp(lse_branch, lse_prefix)
                weight_branch = (lse_branch - lse_both).exp()[..., None]
                weight_prefix = (lse_prefix - lse_both).exp()[..., None]
                out_branch = out_branch * weight_branch + out_prefix * weight_prefix
                lse_branch = lse_both
            out[:, :, branch], lse[:, :, branch] = out_branch, lse_branch
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.branches, ctx.scale = branches, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        q, k, v, out, lse = ctx.saved_tensors
        grads = [zero_heads(t, torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v)]
        for branch, prefix in ctx.branches:
            grad_branch, q_branch, out_branch = (t[:, :, branch] for t in (grad_out, q, out))
            softmax = (out_branch, lse[:, :, branch])  # of branch and prefix together
            for keys, is_causal in (((branch,), True), (prefix, False)):
                if keys:
                    k_part, v_part = gather_slices(k, keys), gather_slices(v, keys)
                    parts = flash_backward(
                        grad_branch, q_branch, k_part, v_part, *softmax, 0.0, is_causal, scale=ctx.scale
                    )
                    for grad, part, slices in zip(grads, parts, ((branch,), keys, keys), strict=True):
                        lengths = [run.stop - run.start for run in slices]
                        for run, run_part in zip(slices, part.split(lengths, dim=2), strict=True):
                            grad[:, :, run] += run_part
        return *(grad.to(q.dtype) for grad in grads), None, None


def zero_heads(like: Float[Tensor, "1 h w d"], dtype: torch.dtype) -> Float[Tensor, "1 h w d"]:
    """Zeros of this shape whose memory is in the order [1 w h d], as the next layer reads it."""
    return like.new_zeros(like.transpose(1, 2).shape, dtype=dtype).transpose(1, 2)


def gather_slices(tokens: Float[Tensor, "1 h w d"], slices: Sequence[slice]) -> Float[Tensor, "1 h n d"]:
    """Concatenate slices of tokens; a single one stays a view."""
    parts = [tokens[:, :, run] for run in slices]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
