"""FlashAttention over a prefix tree: all branches in one call of torch's kernel, which is not compiled.

For CUDA. The kernel takes sequences of different lengths, one after another, and a sequence may have more
keys than queries: then the last query sees the last key. Each branch (see `cpu_attention`) is such a
sequence: its queries are its own tokens, where they stand, and its keys those of its path, which are copied:

    tree      a  b  c  d  x  y  |  e  f
    branches  [a  b  c  d][x  y] [e  f]
    queries    0  1  2  3  4  5   6  7
    keys       0  1  2  3  0  1  4  5  6  7          of [x y] those of a b x y
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_wrapper.prefix_tree.layout import TreeLayout
from dpo_wrapper.tensor_dataclass import TensorDataclass

MAX_WIDTH = 256  # of a head, in the kernel


@dataclass(frozen=True)
class BranchSequences(TensorDataclass):
    """The branches of a tree as the kernel takes them; tokens of padding are one more branch.

    Attributes:
        key_index: for each key its token.
        query_bounds, key_bounds: where the queries and the keys of each branch begin, and where the last end.
        max_queries, max_keys: the most that a branch has of each.
    """

    key_index: Int[Tensor, "n"]
    query_bounds: Int[Tensor, "b"]
    key_bounds: Int[Tensor, "b"]
    max_queries: int
    max_keys: int

    @classmethod
    def from_layout(cls, layout: TreeLayout) -> "BranchSequences":
        """Find the sequences on the CPU, and move them to where the layout is."""
        branches, size = list(layout.branches), layout.ids.numel()
        if branches[-1][0].stop < size:
            branches.append((slice(branches[-1][0].stop, size), ()))
        runs = [np.arange(run.start, run.stop) for branch, prefix in branches for run in (*prefix, branch)]
        queries = np.array([branch.stop - branch.start for branch, _ in branches])
        keys = queries + [sum(run.stop - run.start for run in prefix) for _, prefix in branches]

        def bounds(lengths: NDArray[np.int64]) -> Int[Tensor, "b"]:
            return torch.from_numpy(np.append(0, lengths.cumsum()).astype(np.int32))

        # with one query each, the kernel would take heads for queries
        max_queries, max_keys = max(2, int(queries.max())), max(2, int(keys.max()))
        key_index = torch.from_numpy(np.concatenate(runs))
        sequences = cls(key_index, bounds(queries), bounds(keys), max_queries, max_keys)
        return sequences.to(layout.ids.device)


def branch_sequences(layout: TreeLayout) -> BranchSequences:
    """The sequences of a layout, found once."""
    return layout.remember("branch sequences", lambda: BranchSequences.from_layout(layout))


def fits_flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel is there and takes these heads."""
    dtypes, widths = {t.dtype for t in (q, k, v)}, {t.shape[-1] for t in (q, k, v)}
    return (
        q.is_cuda
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and torch.backends.cuda.flash_sdp_enabled()
        and (dtypes == {torch.float16} or dtypes == {torch.bfloat16})
        and (len(widths) == 1 and q.shape[-1] <= MAX_WIDTH and q.shape[-1] % 8 == 0)
    )


def attend_with_flash(
    layout: TreeLayout,
    q: Float[Tensor, "w h d"],
    k: Float[Tensor, "w g d"],
    v: Float[Tensor, "w g d"],
    window: int | None,
    scale: float | None,
) -> Float[Tensor, "w h d"]:
    """Compute softmax attention over the tokens of a tree; h may be a multiple of g."""
    return FlashAttention.apply(q, k, v, branch_sequences(layout), window, scale)


class FlashAttention(torch.autograd.Function):
    """`attend_with_flash` on the sequences of a tree; once differentiable.

    Like torch's own attention on CUDA, the backward pass adds in an order that is not fixed, unless
    `torch.use_deterministic_algorithms` asks for it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        branches: BranchSequences,
        window: int | None,
        scale: float | None,
    ) -> Tensor:
        lengths = (branches.query_bounds, branches.key_bounds, branches.max_queries, branches.max_keys)
        sides = {"window_size_left": -1, "window_size_right": -1}
        if window is not None:
            sides = {"window_size_left": window - 1, "window_size_right": 0}
        ctx.branches, ctx.arguments = branches, (*lengths, 0.0, window is None)
        ctx.options = {"scale": scale, **sides}
        keys, values = (t.index_select(0, branches.key_index) for t in (k, v))
        out, *statistics, _ = torch.ops.aten._flash_attention_forward(
            q, keys, values, *ctx.arguments, False, **ctx.options
        )
        ctx.save_for_backward(q, k, v, out, *statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *random_state = ctx.saved_tensors
        index = ctx.branches.key_index
        keys, values = (t.index_select(0, index) for t in (k, v))
        grad_q, *grads = torch.ops.aten._flash_attention_backward(
            grad_out, q, keys, values, out, lse, *ctx.arguments, *random_state, **ctx.options
        )
        sums = (torch.zeros_like(t, dtype=torch.float32) for t in (k, v))  # a token may have many copies
        summed = (
            s.index_add_(0, index, grad.float()).to(k.dtype) for s, grad in zip(sums, grads, strict=True)
        )
        return grad_q, *summed, None, None, None
