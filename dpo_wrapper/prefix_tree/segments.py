"""The segments of a prefix tree, through which layers pass a state that they carry along the sequence.

A segment is a run of tokens of which each but the last has one child, the next. It begins with the state
behind the last token of the segment before it on the path:

    tree      a  b  c  d  x  y  |  e  f
    segments [a  b][c  d][x  y]   [e  f]        [c d] and [x y] begin with the state behind b

Segments of one depth are computed together, as rows in groups of similar length: first [a b] and [e f], then
[c d] and [x y]. Long segments are cut, so that fewer tokens of padding fill the groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from dpo_wrapper.prefix_tree.cpu_attention import Branch
from dpo_wrapper.prefix_tree.grouping import group_rows
from dpo_wrapper.tensor_dataclass import TensorDataclass


@dataclass(frozen=True)
class SegmentGroup(TensorDataclass):
    """Segments of one depth as `g` rows of `n` tokens.

    Attributes:
        tokens: their indices; a shorter row is padded with its own last token.
        parents: for each the index of the segment before it, among all of the depth above, the groups one
            after another; None for segments at a root.
    """

    tokens: Int[Tensor, "g n"]
    parents: Int[Tensor, "g"] | None


@dataclass(frozen=True)
class TreeSegments(TensorDataclass):
    """The segments of a tree whose layout has `rw` tokens.

    Attributes:
        depths: the groups of each depth, from the roots on.
        is_padding: for each token of the flattened groups, one after another, whether it pads a row.
        token_index: for each token of the layout, its index in the flattened groups.
    """

    depths: tuple[tuple[SegmentGroup, ...], ...]
    is_padding: Bool[Tensor, "t"]
    token_index: Int[Tensor, "rw"]

    @classmethod
    def from_branches(cls, branches: Sequence[Branch], size: int, max_length: int | None) -> "TreeSegments":
        """Find the segments of a tree, of at most `max_length` tokens, in a layout of `size` tokens."""
        branch_starts = np.array([branch.start for branch, _ in branches])
        fork = np.array([prefix[-1].stop - 1 if prefix else size for _, prefix in branches])
        u = branches[-1][0].stop
        parent = np.arange(-1, u - 1)
        parent[branch_starts] = fork

        forks = fork[fork < size]  # the token behind a fork begins a segment too
        segments = cut_rows(np.arange(u), np.union1d(branch_starts, forks + 1), max_length)
        by_depth: dict[int, list[NDArray[np.int64]]] = {}
        depth_behind = {size: -1}  # by the last token of a segment
        for segment in segments:
            depth = depth_behind[int(parent[segment[0]])] + 1
            depth_behind[int(segment[-1])] = depth
            by_depth.setdefault(depth, []).append(segment)

        depths, offset = [], 0
        token_index, place = np.zeros(size, np.int64), np.zeros(size + 1, np.int64)
        for depth, rows in by_depth.items():
            groups, index = group_rows(rows, size)
            tokens = np.concatenate(rows)
            token_index[tokens] = index.numpy()[tokens] + offset
            parents = [parent[group[:, 0].numpy()] for group in groups]
            depths.append(
                tuple(
                    SegmentGroup(group, torch.from_numpy(place[before]) if depth else None)
                    for group, before in zip(groups, parents, strict=True)
                )
            )
            last = torch.cat([group[:, -1] for group in groups]).numpy()
            place[last] = np.arange(len(last))
            offset += sum(group.numel() for group in groups)
        is_padding = np.ones(offset, bool)
        is_padding[token_index[:u]] = False
        return cls(tuple(depths), torch.from_numpy(is_padding), torch.from_numpy(token_index))


def cut_rows(
    tokens: NDArray[np.int64], starts: NDArray[np.int64], max_length: int | None
) -> list[NDArray[np.int64]]:
    """Cut a row of tokens before these of its tokens, and what is longer into parts of nearly one length."""
    rows = np.split(tokens, starts[1:])
    if max_length is None:
        return rows
    return [part for row in rows for part in np.array_split(row, -(-len(row) // max_length))]
