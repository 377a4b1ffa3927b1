"""Softmaxes of tiles that are kept from the forward pass for the backward pass."""

from collections import deque

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_wrapper.log_probs.tiles import Tiles

MIN_CACHE_BYTES = 64 * 2**20
CPU_CACHE_HEADS = 4
"""On the CPU the cache may be as large as this many copies of the head: training the head takes as much
anyway, for its weight, its gradient and AdamW's two moments."""

BUFFER_BYTES = 64 * 2**20
"""On the CPU tiles lie in buffers of this size. The C library returns a buffer so large to the system as soon
as its last tile is freed. Backward frees tiles while it fills the head's gradient, which replaces them."""


class SoftmaxCache:
    """A queue of softmaxes `[r, w]` and their log-sum-exps: forward appends them, backward takes them out.

    It holds the first tiles of the forward pass, as many as fit into `max_bytes`, in the dtype of the matrix
    products. Backward computes the others again, and all of them when it runs a second time. On the CPU the
    first tiles lie in `buffer`, if given, and more memory is allocated as it is needed.
    """

    def __init__(self, tiles: Tiles, max_bytes: int, buffer: Tensor | None = None) -> None:
        self.device, self.dtype = tiles.hidden.device, tiles.options.matmul_dtype
        self.free_numel = max_bytes // self.dtype.itemsize
        self.remaining_numel = len(tiles.targets) * len(tiles.weight)
        self.buffer = buffer
        self.softmaxes: deque[tuple[Tensor, Tensor]] = deque()

    @staticmethod
    def budget(weight: Float[Tensor, "v d"]) -> int:
        """The bytes that softmaxes may take while the head trains."""
        if weight.device.type != "cpu":
            return MIN_CACHE_BYTES
        return max(MIN_CACHE_BYTES, CPU_CACHE_HEADS * weight.numel() * weight.element_size())

    def reserve(self, tokens: int, entries: int) -> tuple[bool, Float[Tensor, "r w"] | None]:
        """Whether the next tile fits, and memory for it. Once a tile does not fit, none after it is cached.

        An accelerator's allocator needs no help: there the memory is None.
        """
        numel = tokens * entries
        self.free_numel -= numel
        is_cached = self.free_numel >= 0
        if not is_cached or self.device.type != "cpu":
            return is_cached, None
        if self.buffer is None or len(self.buffer) < numel:
            size = max(numel, min(BUFFER_BYTES // self.dtype.itemsize, self.remaining_numel))
            self.buffer = torch.empty(size, dtype=self.dtype, device=self.device)
        out, self.buffer = self.buffer[:numel], self.buffer[numel:]
        self.remaining_numel -= numel
        return True, out.view(tokens, entries)

    def append(self, tile: Float[Tensor, "r w"], lse: Float[Tensor, "r"], out: Tensor | None) -> None:
        """Cache a tile. It is copied into `out`, its reserved memory, unless it was computed there."""
        if out is None:
            out = tile.to(self.dtype)
        elif out.data_ptr() != tile.data_ptr():
            out.copy_(tile)
        self.softmaxes.append((out, lse))

    def pop(self) -> tuple[Tensor, Tensor] | None:
        """Remove and return the next tile and its log-sum-exp; None if there is no other."""
        self.buffer = None
        return self.softmaxes.popleft() if self.softmaxes else None
