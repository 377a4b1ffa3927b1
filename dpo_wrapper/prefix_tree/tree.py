"""Sequences as a prefix tree, so that each token is computed once.

Sort the sequences; what each shares with the one before it is not laid down again. Laid end to end, the rest
is the tree in depth-first order:

    sequences   A: a b c d     tree   token        a  b  c  d  x  y  |  e  f
                B: a b x y            position     0  1  2  3  2  3  |  0  1
                C: e f                subtree_end  6  6  4  4  6  6  |  8  8
    paths       A: 0 1 2 3     B: 0 1 4 5     C: 6 7

`position` is a token's depth, `subtree_end` where the subtree below it ends, and token q may attend to k
exactly when `k <= q < subtree_end[k]`: packing, shared prompts, ranked lists and duplicates are one rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from beartype import beartype
from jaxtyping import Bool, Int, jaxtyped
from torch import Tensor

from dpo_wrapper.prefix_tree.cpu_attention import LEAST, Branch, branches_of
from dpo_wrapper.tensor_dataclass import Movable


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class PrefixTree(Movable):
    """The `u` unique tokens of `s` sequences with `n` tokens in all.

    `path` holds the paths of the sequences, one behind the other: sequence k is the tokens
    `path[start[k]:start[k + 1]]` of the tree.
    """

    ids: Int[Tensor, "u"]
    position: Int[Tensor, "u"]
    subtree_end: Int[Tensor, "u"]
    path: Int[Tensor, "n"]
    start: Int[Tensor, "_"]

    @classmethod
    def from_sequences(cls, sequences: Sequence[Any]) -> "PrefixTree":
        """The tree of sequences of ids (tensors, arrays or lists); any may be empty or equal to another.

        Time is linear in the tokens, but for the sort of the sequences.
        """
        rows = [np.asarray(row, dtype=np.int64) for row in sequences]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        start = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
        # as big-endian bytes rows sort the way their ids do, each comparison being one of memory
        keys = [(row ^ np.int64(-(2**63))).astype(">i8").tobytes() for row in rows]

        path = np.empty(int(start[-1]), np.int64)
        ids, position, subtree_end = (np.empty(int(start[-1]), np.int64) for _ in range(3))
        size, before, trail = 0, np.empty(0, np.int64), np.empty(0, np.int64)
        for k in sorted(range(len(rows)), key=keys.__getitem__):
            row = rows[k]
            both = min(len(row), len(before))
            differs = row[:both] != before[:both]
            shared = int(differs.argmax()) if differs.any() else both
            subtree_end[trail[shared:]] = size  # what is left of the path before ends here
            new = len(row) - shared
            ids[size : size + new] = row[shared:]
            position[size : size + new] = np.arange(shared, len(row))
            trail = np.concatenate([trail[:shared], np.arange(size, size + new)])
            path[start[k] : start[k + 1]] = trail
            size, before = size + new, row
        subtree_end[trail] = size

        tensors = (ids[:size], position[:size], subtree_end[:size], path, start)
        return cls(*(torch.from_numpy(array.copy()) for array in tensors))

    def sequences(self) -> list[Int[Tensor, "_"]]:
        """The sequences that the tree was made of, in their order."""
        return list(self.ids[self.path].split(self.start.diff().tolist()))

    def attends(self) -> Bool[Tensor, "u u"]:
        """Whether token q (row) may attend to token k (column)."""
        place = torch.arange(len(self.ids), device=self.ids.device)
        return (place <= place[:, None]) & (place[:, None] < self.subtree_end)

    def leaf_paths(self) -> list[Int[Tensor, "_"]]:
        """The paths that no other path goes on from, each once."""
        place = torch.arange(1, len(self.ids) + 1, device=self.ids.device)
        is_leaf = self.subtree_end == place
        taken: dict[int, Tensor] = {}
        for path in self.path.split(self.start.diff().tolist()):
            if len(path) and is_leaf[path[-1]]:
                taken[int(path[-1])] = path
        return list(taken.values())


PADDING = 0.15
"""Share of a group's places that padding may take before another group is opened."""


@dataclass(frozen=True)
class TreeLayout(Movable):
    """A tree's `u` tokens as rows for a model, and as ordinary sequences for its attention.

    The tokens lie in `shape` = (r, w) rows, row by row; places from u on are padding. `groups` holds for each
    group of sequences `Int[g n]`, the places of their tokens, each padded with its own last; `home` the place
    of every token in the groups, laid end to end.
    """

    shape: tuple[int, int]
    ids: Int[Tensor, "r w"]
    position: Int[Tensor, "r w"]
    groups: tuple[Int[Tensor, "g n"], ...]
    home: Int[Tensor, "rw"]
    subtree_end: Int[Tensor, "u"]
    branches: tuple[Branch, ...]
    kernel: str = "own"
    """What computes attention that is plain: FlexAttention (`flex`), torch's kernel on each branch
    (`branches`), or the model itself, along each path (`own`)."""
    least: int = LEAST
    """As in `branches`."""

    @classmethod
    def of(
        cls, tree: PrefixTree, most: int | None = None, *, kernel: str = "own", least: int | None = None
    ) -> "TreeLayout":
        """Rows are no wider than `most`. Only paths to a leaf become sequences: others are parts of those."""
        u = len(tree.ids)
        rows = -(-u // min(u, most or u))
        width = -(-u // rows)

        def laid(values: Tensor) -> Tensor:
            return torch.nn.functional.pad(values, (0, rows * width - u)).view(rows, width)

        paths = sorted(tree.leaf_paths(), key=len)
        groups, filled = [], 0
        home = torch.zeros(rows * width, dtype=torch.long)
        while paths:
            longest, size, real = len(paths[-1]), 0, 0
            while size < len(paths) and real + len(paths[-1 - size]) >= (1 - PADDING) * longest * (size + 1):
                real += len(paths[-1 - size])
                size += 1
            table = torch.stack(
                [path[torch.arange(longest).clamp(max=len(path) - 1)] for path in paths[-size:]]
            )
            places = torch.arange(filled, filled + table.numel()).view(table.shape)
            for path, place in zip(paths[-size:], places, strict=True):
                home[path] = place[: len(path)]
            groups.append(table)
            filled += table.numel()
            del paths[-size:]
        ids, position = laid(tree.ids), laid(tree.position)
        if kernel == "flex" and rows > 1:
            kernel = "own"
        rest = (tree.subtree_end, branches_of(tree.position), kernel, LEAST if least is None else least)
        return cls((rows, width), ids, position, tuple(groups), home, *rest)

    def block_mask(self, window: int | None) -> Any:
        """The tree's block mask for FlexAttention, made once for each width of a sliding window."""
        from dpo_wrapper.prefix_tree.flex_attention import tree_block_mask

        made = vars(self).setdefault("_masks", {})
        if window not in made:
            made[window] = tree_block_mask(self.subtree_end, self.position[0], window)
        return made[window]
