"""Tiles of logits: how many tokens and words each has, and where it is computed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from dpo_wrapper.cpu_matmul import matmul
from dpo_wrapper.log_probs.eager import accumulation_dtype
from dpo_wrapper.log_probs.statistics import Folded

ROWS = 8192
"""Tokens in a tile."""

Fold = Callable[..., Folded]


@dataclass(frozen=True)
class Options:
    """How a head makes logits of hidden states, and how much memory that may take."""

    logit_scale: float
    softcap: float | None
    dtype: torch.dtype
    """Of the matrix products."""
    fold: Fold
    tile_bytes: int
    keep_bytes: int
    part_rows: int
    """Tokens that are finished at once, where their loss is known."""
    differentiates: bool = True
    """Whether gradients may be asked for: a Function cannot tell by itself."""
    extras: bool = False
    group: ProcessGroup | None = None
    """The processes that hold a part of the vocabulary each, in the order of their ranks."""
    offset: int = 0
    """The first word of this process's part."""

    @property
    def wide(self) -> torch.dtype:
        return accumulation_dtype(self.dtype)


def spans(n: int, most: int, multiple: int = 1) -> Iterator[slice]:
    """0 to n in stretches as even as may be, of at most `most`."""
    size = -(-n // max(1, -(-n // max(1, most))))
    size = max(1, -(-size // multiple) * multiple)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


class Tiles:
    """The tiles of t tokens and v words: words outside, tokens inside."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options
    ) -> None:
        self.hidden, self.weight, self.bias, self.targets = hidden, weight, bias, targets
        self.options = options
        t, v = len(targets), len(weight)
        per_value = options.wide.itemsize + (options.dtype.itemsize if options.dtype != options.wide else 0)
        self.rows = list(spans(t, ROWS))
        words = options.tile_bytes // (per_value * max(1, min(t, ROWS)))
        self.words = list(spans(v, words, 64 if words >= 64 else 1))
        self.scratch: Tensor | None = None

    def part(self, rows: Any) -> "Tiles":
        """The tiles of some tokens alone, in the same memory."""
        tiles = Tiles(self.hidden[rows], self.weight, self.bias, self.targets[rows], self.options)
        tiles.scratch = self.scratch
        return tiles

    def fold(
        self, rows: slice, words: slice, *, out: Tensor | None = None, stays: bool = False, **kwargs: Any
    ) -> Folded:
        """A tile, in `out` or, unless it `stays`, where the next one will be."""
        options = self.options
        if out is not None and out.dtype != options.wide:
            out = None  # computed wide, and narrowed when it is kept
        a, b = self.hidden[rows].to(options.dtype), self.weight[words].to(options.dtype).T
        block = matmul(a, b, None if stays else self.room(len(a), b.shape[1]))
        local = self.local(rows, words)
        bias = None if self.bias is None else self.bias[words]
        return options.fold(block, local, bias, options.logit_scale, options.softcap, out=out, **kwargs)

    def room(self, rows: int, words: int) -> Float[Tensor, "r w"]:
        """The same memory each time."""
        if self.scratch is None or len(self.scratch) < rows * words:
            self.scratch = self.hidden.new_empty(rows * words, dtype=self.options.dtype)
        return self.scratch[: rows * words].view(rows, words)

    def local(self, rows: slice, words: slice) -> Int[Tensor, "r"]:
        """Each target's column in a tile, or -1."""
        local = self.targets[rows] - (self.options.offset + words.start)
        return local.where((local >= 0) & (local < words.stop - words.start), -1)

    def new(self, *shape: int) -> Tensor:
        return self.hidden.new_zeros(shape, dtype=self.options.wide)
