"""FlexAttention over a prefix tree: block-sparse, no token copied, no mask of size [w, w] in memory.

For CUDA. On the CPU torch runs FlexAttention without gradients only, which suffices to test the block mask.
"""

from collections.abc import Callable, Hashable
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK_SIZE = 128  # queries and keys in one block


@cache
def compile_flex_attention(*_key: Hashable) -> Callable[..., Tensor]:
    """FlexAttention compiled for calls that have this key in common.

    torch compiles a function a few times only, counted for the process, and then runs it uncompiled, which
    makes a mask of size [w, w]. Two models with windows are enough. So each key has a function of its own.
    """
    number = compile_flex_attention.cache_info().currsize
    code = attend_uncompiled.__code__.replace(co_name=f"attend_{number}")  # torch counts by code objects
    return torch.compile(FunctionType(code, globals()), dynamic=True)


def attend_uncompiled(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float | None) -> Any:
    """FlexAttention as torch has it."""
    return flex_attention(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def create_tree_block_mask(
    subtree_end: Int[Tensor, "w"], position: Int[Tensor, "w"], window: int | None = None
) -> BlockMask:
    """Create the block mask of `k <= q < subtree_end[k]`.

    With a window, tokens attend only where `position[q] - position[k] < window` as well. Whether a block has
    any pair that attends, and whether all of its pairs do, follows from the smallest and the largest
    `subtree_end` of its keys, so that no mask over tokens is needed.
    """
    w = len(subtree_end)
    device, count = subtree_end.device, -(-w // BLOCK_SIZE)
    ends = F.pad(subtree_end, (0, count * BLOCK_SIZE - w)).view(count, BLOCK_SIZE)
    start = torch.arange(count, device=device) * BLOCK_SIZE
    attends = (start <= start[:, None]) & (ends.amax(dim=1) > start[:, None])
    full = (start < start[:, None]) & (ends.amin(dim=1) >= start[:, None] + BLOCK_SIZE)
    if window is not None:
        full = torch.zeros_like(full)

    def mask_mod(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < subtree_end[k])

    def windowed_mask_mod(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert window is not None
        return (k <= q) & (q < subtree_end[k]) & (position[q] - position[k] < window)

    return BlockMask.from_kv_blocks(
        *list_key_blocks(attends & ~full),
        *list_key_blocks(full),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=mask_mod if window is None else windowed_mask_mod,
        seq_lengths=(w, w),
    )


def list_key_blocks(blocks: Bool[Tensor, "m m"]) -> tuple[Int[Tensor, "1 1 m"], Int[Tensor, "1 1 m m"]]:
    """For each block of queries: the number of its blocks of keys, and all indices with those first."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(dim=1).int()[None, None], order.int()[None, None]


def attend_with_flex(
    q: Float[Tensor, "1 h w d"],
    k: Float[Tensor, "1 g w d"],
    v: Float[Tensor, "1 g w e"],
    block_mask: BlockMask,
    scale: float | None,
) -> Float[Tensor, "1 h w e"]:
    """Compute softmax attention under a block mask; h may be a multiple of g."""
    if not q.is_cuda:
        return attend_uncompiled(q, k, v, block_mask, scale)
    tensors = tuple((t.dtype, t.device, t.shape[1], t.shape[3], t.requires_grad) for t in (q, k, v))
    key = block_mask.mask_mod.__code__, scale, torch.is_grad_enabled(), tensors
    return compile_flex_attention(*key)(q, k, v, block_mask, scale)
