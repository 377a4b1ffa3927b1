"""Softmaxes of tiles that are kept from the forward pass for the backward pass."""

from collections import deque

import torch
from jaxtyping import Float
from torch import Tensor

MIN_CACHE_BYTES = 64 * 2**20
CPU_CACHE_HEADS = 4
"""On the CPU the cache may be as large as this many copies of the head: training the head takes as much
anyway, for its weight, its gradient and AdamW's two moments."""

BUFFER_BYTES = 64 * 2**20
"""On the CPU tiles lie in buffers of this size. The C library returns a buffer so large to the system as soon
as its last tile is freed. Backward frees tiles while it fills the head's gradient, which takes their
place."""


class SoftmaxCache:
    """A queue of tiles `[r, w]` and their log-sum-exps: forward appends tiles, backward takes them out.

    It holds the first tiles of the forward pass, as many as fit. Backward computes the others again, and all
    of them when it runs a second time.

    Args:
        max_bytes: the memory that all cached tiles may take.
        numel: the numbers that all tiles have, cached or not.
        device: where the tiles are.
        dtype: the dtype that they are stored in, which is that of the matrix products.
        buffer: memory for the first tiles, on the CPU alone; more is allocated as it is needed.
    """

    def __init__(
        self,
        max_bytes: int,
        numel: int,
        device: torch.device,
        dtype: torch.dtype,
        buffer: Tensor | None = None,
    ) -> None:
        self.free_numel = max_bytes // dtype.itemsize
        self.remaining_numel = numel
        self.device, self.dtype = device, dtype
        self.buffer = buffer
        self.tiles: deque[tuple[Tensor, Tensor]] = deque()

    @staticmethod
    def budget(weight: Float[Tensor, "v d"]) -> int:
        """The bytes that softmaxes may take while the head trains."""
        if weight.device.type != "cpu":
            return MIN_CACHE_BYTES
        return max(MIN_CACHE_BYTES, CPU_CACHE_HEADS * weight.numel() * weight.element_size())

    def reserve(self, numel: int) -> bool:
        """Whether the next tile fits. Once one does not, none after it is cached."""
        self.free_numel -= numel
        return self.free_numel >= 0

    def allocate(self, tokens: int, entries: int) -> Float[Tensor, "r w"] | None:
        """Memory for a reserved tile; None on an accelerator, whose allocator needs no help."""
        if self.device.type != "cpu":
            return None
        numel = tokens * entries
        if self.buffer is None or len(self.buffer) < numel:
            size = max(numel, min(BUFFER_BYTES // self.dtype.itemsize, self.remaining_numel))
            self.buffer = torch.empty(size, dtype=self.dtype)
        out, self.buffer = self.buffer[:numel], self.buffer[numel:]
        self.remaining_numel -= numel
        return out.view(tokens, entries)

    def append(self, tile: Float[Tensor, "r w"], lse: Float[Tensor, "r"], out: Tensor | None) -> None:
        """Cache a tile. It is copied into `out`, its allocated memory, unless it was computed there."""
        if out is None:
            out = tile.to(self.dtype)
        elif out.data_ptr() != tile.data_ptr():
            out.copy_(tile)
        self.tiles.append((out, lse))

    def pop(self) -> tuple[Tensor, Tensor] | None:
        """The next tile and its log-sum-exp, which the cache then holds no longer; None if there is no
        other.
        """
        self.buffer = None
        return self.tiles.popleft() if self.tiles else None
