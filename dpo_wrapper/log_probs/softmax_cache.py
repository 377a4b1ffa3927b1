"""Tiles that are kept from the forward pass for the backward pass."""

from collections import deque

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_wrapper.log_probs.backend import ReducedTile
from dpo_wrapper.log_probs.tiles import Tiles

MIN_CACHE_BYTES = 64 * 2**20
CPU_CACHE_HEADS = 4
"""On the CPU the cache may be as large as this many copies of the head: training the head takes as much
anyway, for its weight, its gradient and AdamW's two moments."""

MAX_CACHE_BYTES = 2 * 2**30
MAX_CACHE_SHARE = 0.25
"""Elsewhere the cache may be as large as this share of the device's free memory, within the bytes above."""

BUFFER_BYTES = 64 * 2**20
"""On the CPU tiles lie in buffers of this size. The C library returns a buffer so large to the system as soon
as its last tile is freed. Backward frees tiles while it fills the head's gradient, which replaces them."""


def cache_room(weight: Float[Tensor, "v d"]) -> int:
    """The bytes that may be taken while the head trains, to compute no product twice."""
    if weight.device.type == "cpu":
        return max(MIN_CACHE_BYTES, CPU_CACHE_HEADS * weight.numel() * weight.element_size())
    share = int(MAX_CACHE_SHARE * free_bytes(weight.device))
    return max(MIN_CACHE_BYTES, min(MAX_CACHE_BYTES, share))


def free_bytes(device: torch.device) -> int:
    """The memory that a device has free, or that torch holds without using it; 0 where it is not known."""
    if device.type != "cuda":
        return 0
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


class SoftmaxCache:
    """A queue of tiles `[r, w]`: forward appends them, backward takes them out.

    They are softmaxes with their log-sum-exps, or raw products without, as the backend has it. It holds the
    first tiles of the forward pass, as many as fit into `max_bytes`, in the dtype of the matrix products.
    Backward computes the others again, and all of them when it runs a second time. On the CPU the first tiles
    lie in `buffer`, if given, and more memory is allocated as it is needed.
    """

    def __init__(self, tiles: Tiles, max_bytes: int, buffer: Tensor | None = None) -> None:
        self.device, self.dtype = tiles.hidden.device, tiles.options.matmul_dtype
        self.free_numel = max_bytes // self.dtype.itemsize
        self.remaining_numel = len(tiles.targets) * len(tiles.weight)
        self.buffer = buffer
        self.tiles: deque[tuple[Tensor, Tensor | None]] = deque()

    @staticmethod
    def budget(tiles: Tiles) -> int:
        """The bytes that tiles may take while the head trains.

        On the CPU each tile that is cached saves its product. On an accelerator, where memory is short while
        the activations of the whole model are held, all tiles are cached, or none.
        """
        room = cache_room(tiles.weight)
        if tiles.hidden.device.type == "cpu" or tiles.num_bytes() <= room:
            return room
        return 0

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

    def append(self, new: ReducedTile, out: Tensor | None) -> None:
        """Cache a tile. It is copied into `out`, its reserved memory, unless it was computed there."""
        tile = new.tile
        if out is None:
            out = tile.to(self.dtype)
        elif out.data_ptr() != tile.data_ptr():
            out.copy_(tile)
        self.tiles.append((out, new.lse))

    def pop(self) -> tuple[Tensor | None, Tensor | None]:
        """Remove and return the next tile and its log-sum-exp; None if there is no other."""
        self.buffer = None
        return self.tiles.popleft() if self.tiles else (None, None)
