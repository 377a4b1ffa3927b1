"""FlexAttention over a prefix tree: block-sparse, nothing expanded, no mask in memory.

For CUDA. On the CPU torch runs FlexAttention forward only, which is where tests hold the block mask right.
"""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128


def tree_block_mask(
    subtree_end: Int[Tensor, "w"], position: Int[Tensor, "w"], window: int | None = None
) -> BlockMask:
    """The rule of the tree, `k <= q < subtree_end[k]` (and `position[q] - position[k] < window`), by blocks.

    Whether a block of queries meets a block of keys, and whether it does so in every place, follows from the
    highest and lowest `subtree_end` of the keys: nothing of size [w, w] is made.
    """
    w = len(subtree_end)
    device, count = subtree_end.device, -(-w // BLOCK)
    last = torch.nn.functional.pad(subtree_end, (0, count * BLOCK - w)).view(count, BLOCK)
    begin = torch.arange(count, device=device) * BLOCK
    before = begin <= begin[:, None]
    meets = before & (last.amax(dim=1) > begin[:, None])
    whole = (begin < begin[:, None]) & (last.amin(dim=1) >= begin[:, None] + BLOCK)
    if window is not None:
        whole = torch.zeros_like(whole)

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """How many key blocks each query block has, and which, those first."""
        order = blocks.int().argsort(dim=1, descending=True, stable=True)
        return blocks.sum(dim=1).int()[None, None], order.int()[None, None]

    def rule(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = (k <= q) & (q < subtree_end[k])
        return allowed if window is None else allowed & (position[q] - position[k] < window)

    return BlockMask.from_kv_blocks(
        *listed(meets & ~whole), *listed(whole), BLOCK_SIZE=BLOCK, mask_mod=rule, seq_lengths=(w, w)
    )


@cache
def compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def flex_attend(
    q: Float[Tensor, "1 h w d"],
    k: Float[Tensor, "1 g w d"],
    v: Float[Tensor, "1 g w e"],
    mask: BlockMask,
    scale: float | None,
) -> Float[Tensor, "1 h w e"]:
    """Attention under a block mask, with as many heads of keys and values as divide those of the queries."""
    function = compiled() if q.is_cuda else flex_attention
    return function(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
