"""Softmaxes that are kept from forward to backward, for as much memory as they may take."""

from collections import deque

import torch
from jaxtyping import Float
from torch import Tensor

STRETCH_BYTES = 64 * 2**20
"""Tiles on the CPU share stretches of memory of this size, so large that the C library hands each back to the
system as soon as its last tile has been used: backward empties them while it fills the head's gradient."""


class Kept:
    """A queue of the first tiles, `[r, w]` softmaxes with their log-sum-exps; backward uses it up.

    Where backward runs a second time, nothing is left, and the tiles are computed again.
    """

    def __init__(
        self, room: int, whole: int, device: torch.device, dtype: torch.dtype, stretch: Tensor | None = None
    ) -> None:
        """Room in bytes, how many numbers all tiles have, and memory on the CPU to begin with."""
        self.most, self.whole = room // dtype.itemsize, whole
        self.device, self.dtype = device, dtype
        self.stretch = stretch
        self.tiles: deque[tuple[Tensor, Tensor]] = deque()

    def takes(self, size: int) -> bool:
        """Whether there is room for the next tile; once there is none, there is none for later ones."""
        self.most -= size
        return self.most >= 0

    def slot(self, rows: int, words: int) -> Float[Tensor, "r w"] | None:
        """Where a tile that is taken should be written; None where any memory does."""
        if self.device.type != "cpu":
            return None
        size = rows * words
        if self.stretch is None or len(self.stretch) < size:
            numbers = max(size, min(STRETCH_BYTES // self.dtype.itemsize, self.whole))
            self.stretch = torch.empty(numbers, dtype=self.dtype)
        slot, self.stretch = self.stretch[:size], self.stretch[size:]
        self.whole -= size
        return slot.view(rows, words)

    def add(self, block: Float[Tensor, "r w"], lse: Float[Tensor, "r"], slot: Tensor | None) -> None:
        """Keep a tile, which may have been written into its slot already."""
        if slot is None:
            slot = block.to(self.dtype)
        elif slot.data_ptr() != block.data_ptr():
            slot.copy_(block)
        self.tiles.append((slot, lse))

    def next(self) -> tuple[Tensor, Tensor] | None:
        """The first of the tiles that are left, which is then the caller's."""
        self.stretch = None
        return self.tiles.popleft() if self.tiles else None
