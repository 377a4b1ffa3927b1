"""Sequences as a prefix tree, in which each token that they share stands once.

The sequences are sorted, and of each the prefix that it shares with the one before is left out. What is left,
one sequence after another, is the tree in depth-first order:

    sequences   A: a b c d     tree   token        a  b  c  d  x  y  |  e  f
                B: a b x y            position     0  1  2  3  2  3  |  0  1
                C: e f                subtree_end  6  6  4  4  6  6  |  8  8
    paths       A: 0 1 2 3     B: 0 1 4 5     C: 6 7

`position` is a token's depth, and `subtree_end` the index at which the subtree below the token ends. Token q
may attend to token k exactly if `k <= q < subtree_end[k]`. This one rule covers prompts that a pair shares,
ranked lists, equal sequences, and sequences with nothing in common (packing).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from dpo_wrapper.tensor_dataclass import TensorDataclass


@dataclass(frozen=True)
class PrefixTree(TensorDataclass):
    """The `u` unique tokens of `s` sequences with `n` tokens in all.

    `path` holds the paths of all sequences, one after another: sequence k consists of the tree's tokens
    `path[start[k]:start[k + 1]]`.
    """

    ids: Int[Tensor, "u"]
    position: Int[Tensor, "u"]
    subtree_end: Int[Tensor, "u"]
    path: Int[Tensor, "n"]
    start: Int[Tensor, "_"]

    @classmethod
    def from_sequences(cls, sequences: Sequence[Any]) -> "PrefixTree":
        """Build the tree of tensors, arrays or lists of token ids; any may be empty or equal to another.

        Apart from sorting the sequences, the time is linear in the number of tokens.
        """
        rows = [np.asarray(x.numpy() if isinstance(x, Tensor) else x, dtype=np.int64) for x in sequences]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        start = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
        # as big-endian bytes, rows sort as their ids do, and one comparison is one call of memcmp
        keys = [(row ^ np.int64(-(2**63))).astype(">i8").tobytes() for row in rows]

        path = np.empty(int(start[-1]), np.int64)
        ids, position, subtree_end = (np.empty(int(start[-1]), np.int64) for _ in range(3))
        size, previous_row, current_path = 0, np.empty(0, np.int64), np.empty(0, np.int64)
        for k in sorted(range(len(rows)), key=keys.__getitem__):
            row = rows[k]
            shorter = min(len(row), len(previous_row))
            differs = row[:shorter] != previous_row[:shorter]
            shared = int(differs.argmax()) if differs.any() else shorter
            subtree_end[current_path[shared:]] = size  # the rest of the previous path ends here
            new = len(row) - shared
            ids[size : size + new] = row[shared:]
            position[size : size + new] = np.arange(shared, len(row))
            current_path = np.concatenate([current_path[:shared], np.arange(size, size + new)])
            path[start[k] : start[k + 1]] = current_path
            size, previous_row = size + new, row
        subtree_end[current_path] = size

        arrays = (ids[:size], position[:size], subtree_end[:size], path, start)
        return cls(*(torch.from_numpy(array.copy()) for array in arrays))

    def leaf_paths(self) -> list[NDArray[np.int64]]:
        """The paths that end at a leaf, each once: every other path is the beginning of one of them."""
        path, start, subtree_end = self.path.numpy(), self.start.numpy(), self.subtree_end.numpy()
        filled = np.flatnonzero(np.diff(start))
        last = path[start[filled + 1] - 1]
        is_leaf = subtree_end[last] == last + 1
        path_of_leaf = dict(zip(last[is_leaf].tolist(), filled[is_leaf].tolist(), strict=True))
        return [path[start[k] : start[k + 1]] for k in path_of_leaf.values()]
