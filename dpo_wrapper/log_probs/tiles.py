"""Tiles of logits: their sizes, their memory, and how each is computed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from dpo_wrapper.cpu_matmul import matmul
from dpo_wrapper.log_probs.dtypes import accumulation_dtype
from dpo_wrapper.log_probs.statistics import TileSoftmax

TILE_TOKENS = 8192
"""The most tokens in a tile."""

TILE_BYTES = {"cpu": 12 * 2**20, "other": 256 * 2**20}
"""The memory of a tile. On the CPU it fits into the processor's cache, and is too small for the C library to
return to the system each time it is freed."""

TokenIndex = slice | Int[Tensor, "k"]
"""What selects some of the t tokens."""


@dataclass(frozen=True)
class GatherOptions:
    """How logits are computed from hidden states, and what is computed from logits."""

    logit_scale: float
    softcap: float | None
    matmul_dtype: torch.dtype
    tile_softmax: Callable[..., TileSoftmax]  # of a backend, as `torch_tile` specifies it
    needs_grad: bool  # whether gradients are enabled, which an autograd Function cannot find out
    needs_extras: bool = False
    vocab_group: ProcessGroup | None = None  # each process holds a slice of the vocabulary
    vocab_offset: int = 0  # where the slice of this process begins

    @property
    def accumulation_dtype(self) -> torch.dtype:
        return accumulation_dtype(self.matmul_dtype)


def even_slices(n: int, max_size: int, multiple: int = 1) -> Iterator[slice]:
    """Cut `range(n)` into the fewest slices of at most `max_size`, as even as can be.

    With a `multiple`, all sizes but the last are rounded up to it, which may exceed `max_size`.
    """
    size = -(-n // max(1, -(-n // max(1, max_size))))
    size = max(1, -(-size // multiple) * multiple)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


@dataclass
class Tiles:
    """The logits of t tokens over v vocabulary entries, cut into tiles of r tokens by w entries.

    Loops run over `vocab_slices` outside and `token_slices` inside, so that the gradient of one slice of the
    head is finished before that of the next begins.
    """

    hidden: Float[Tensor, "t d"]
    weight: Float[Tensor, "v d"]
    bias: Float[Tensor, "v"] | None
    targets: Int[Tensor, "t"]
    options: GatherOptions
    buffer: Tensor | None = None  # of the raw products, which each tile overwrites

    def __post_init__(self) -> None:
        t, v = len(self.targets), len(self.weight)
        dtypes = {self.options.matmul_dtype, self.options.accumulation_dtype}  # a tile exists once in each
        entry_bytes = sum(dtype.itemsize for dtype in dtypes) * max(1, min(t, TILE_TOKENS))
        max_entries = TILE_BYTES.get(self.hidden.device.type, TILE_BYTES["other"]) // entry_bytes
        self.token_slices = list(even_slices(t, TILE_TOKENS))
        self.vocab_slices = list(even_slices(v, max_entries, 64 if max_entries >= 64 else 1))

    def select(self, tokens: TokenIndex) -> "Tiles":
        """The tiles of some tokens, in the same buffer."""
        return replace(self, hidden=self.hidden[tokens], targets=self.targets[tokens])

    def softmax(
        self,
        token_slice: slice,
        vocab_slice: slice,
        *,
        out: Tensor | None = None,
        needs_own_memory: bool = False,
        **kwargs: Any,
    ) -> TileSoftmax:
        """Compute one tile, with the keyword arguments of `tile_softmax`.

        The next tile overwrites it, unless it is written to `out` or `needs_own_memory`.
        """
        options = self.options
        if out is not None and out.dtype != options.accumulation_dtype:
            out = None  # the softmax is computed wider, and the cache narrows it
        hidden = self.hidden[token_slice].to(options.matmul_dtype)
        weight = self.weight[vocab_slice].to(options.matmul_dtype)
        buffer = None
        if not needs_own_memory:
            numel = len(hidden) * len(weight)
            if self.buffer is None or len(self.buffer) < numel:
                self.buffer = hidden.new_empty(numel)
            buffer = self.buffer[:numel].view(len(hidden), len(weight))
        tile = matmul(hidden, weight.T, buffer)
        target_column = self.target_column(token_slice, vocab_slice)
        bias = None if self.bias is None else self.bias[vocab_slice]
        return options.tile_softmax(
            tile, target_column, bias, options.logit_scale, options.softcap, out=out, **kwargs
        )

    def target_column(self, token_slice: slice, vocab_slice: slice) -> Int[Tensor, "r"]:
        """The column of each token's target in a tile, -1 where the tile does not hold it."""
        column = self.targets[token_slice] - (self.options.vocab_offset + vocab_slice.start)
        return column.where((column >= 0) & (column < vocab_slice.stop - vocab_slice.start), -1)

    def zeros(self, *shape: int) -> Tensor:
        """Zeros in the dtype of sums."""
        return self.hidden.new_zeros(shape, dtype=self.options.accumulation_dtype)
