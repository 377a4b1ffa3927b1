"""Tiles of logits: their sizes, their memory, and how each is computed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from dpo_wrapper.cpu_matmul import matmul
from dpo_wrapper.log_probs.backend import RawTile, TileBackend
from dpo_wrapper.log_probs.dtypes import accumulation_dtype

TILE_TOKENS = 8192
"""The most tokens in a tile."""

TILE_BYTES = {"cpu": 12 * 2**20, "other": 128 * 2**20}
"""The memory of a tile. On the CPU it fits into the processor's cache, and is too small for the C library to
return to the system each time it is freed. Elsewhere a tile's products take longer than their launches."""

TokenIndex = slice | Int[Tensor, "k"]
"""What selects some of the t tokens."""


@dataclass(frozen=True)
class GatherOptions:
    """How logits are computed from hidden states, and what is computed from logits."""

    logit_scale: float
    softcap: float | None
    matmul_dtype: torch.dtype
    backend: TileBackend
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
        t, v, backend = len(self.targets), len(self.weight), self.options.backend
        entry_bytes = backend.entry_bytes(self.options.matmul_dtype) * max(1, min(t, TILE_TOKENS))
        max_entries = TILE_BYTES.get(self.hidden.device.type, TILE_BYTES["other"]) // entry_bytes
        max_entries = min(max_entries, backend.max_width or max_entries)
        self.token_slices = list(even_slices(t, TILE_TOKENS))
        self.vocab_slices = list(even_slices(v, max_entries, 64 if max_entries >= 64 else 1))
        self.targets = self.targets.contiguous()
        self.matmul_hidden = self.hidden.to(self.options.matmul_dtype)
        self._cast_weight: tuple[slice, Tensor] | None = None

    def select(self, tokens: TokenIndex) -> "Tiles":
        """The tiles of some tokens, in the same buffer."""
        return replace(self, hidden=self.hidden[tokens], targets=self.targets[tokens])

    def matmul_weight(self, vocab_slice: slice) -> Float[Tensor, "w d"]:
        """A slice of the weight in the dtype of the products, cast once while the loop stays at it."""
        weight = self.weight[vocab_slice]
        if weight.dtype == self.options.matmul_dtype:
            return weight
        if self._cast_weight is None or self._cast_weight[0] != vocab_slice:
            self._cast_weight = None  # free it before the next is made
            self._cast_weight = (vocab_slice, weight.to(self.options.matmul_dtype))
        return self._cast_weight[1]

    def multiply(self, token_slice: slice, vocab_slice: slice, needs_own_memory: bool = False) -> RawTile:
        """Compute the products of one tile. The next overwrites them, unless it `needs_own_memory`."""
        hidden, weight = self.matmul_hidden[token_slice], self.matmul_weight(vocab_slice)
        buffer = None
        if not needs_own_memory:
            numel = len(hidden) * len(weight)
            if self.buffer is None or len(self.buffer) < numel:
                self.buffer = hidden.new_empty(numel)
            buffer = self.buffer[:numel].view(len(hidden), len(weight))
        return self.as_tile(matmul(hidden, weight.T, buffer), token_slice, vocab_slice)

    def as_tile(self, product: Float[Tensor, "r w"], token_slice: slice, vocab_slice: slice) -> RawTile:
        """A tile of these products, or of what was made of them."""
        options, bias = self.options, None if self.bias is None else self.bias[vocab_slice]
        vocab_start = options.vocab_offset + vocab_slice.start
        targets = self.targets[token_slice]
        return RawTile(product, targets, vocab_start, bias, options.logit_scale, options.softcap)

    def num_bytes(self) -> int:
        """The bytes of all tiles together, in the dtype of the products."""
        return len(self.targets) * len(self.weight) * self.options.matmul_dtype.itemsize

    def zeros(self, *shape: int) -> Tensor:
        """Zeros in the dtype of sums."""
        return self.hidden.new_zeros(shape, dtype=self.options.accumulation_dtype)
