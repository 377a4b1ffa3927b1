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
    """Segments of one depth, as rows of one length.

    Attributes:
        shape: the number of rows, and of tokens in each.
        parents: for each row the index of the segment before it, among all of the depth above, the groups one
            after another; zeros for segments at a root.
    """

    shape: tuple[int, int]
    parents: Int[Tensor, "g"]


@dataclass(frozen=True)
class TreeSegments(TensorDataclass):
    """The segments of a tree whose layout has `rw` tokens.

    Attributes:
        depths: the groups of each depth, from the roots on.
        tokens: the indices of the tokens of all groups, row after row. A shorter segment is padded with its
            own last token.
        is_padding: whether each of these pads a row.
        token_index: for each token of the layout, its place among `tokens`; 0 for the layout's own padding.
    """

    depths: tuple[tuple[SegmentGroup, ...], ...]
    tokens: Int[Tensor, "t"]
    is_padding: Bool[Tensor, "t"]
    token_index: Int[Tensor, "rw"]

    @classmethod
    def from_branches(cls, branches: Sequence[Branch], size: int, max_length: int | None) -> "TreeSegments":
        """Find the segments of a tree, of at most `max_length` tokens, in a layout of `size` tokens."""
        parent = find_parents(branches)
        u = len(parent) - 1
        branch_starts = np.array([branch.start for branch, _ in branches])
        forks = parent[branch_starts]
        starts = np.union1d(branch_starts, forks + 1)  # the token behind a fork begins a segment too
        by_depth: dict[int, list[NDArray[np.int64]]] = {}
        depth_behind = {-1: -1}  # by the last token of a segment
        for segment in cut_rows(np.arange(u), starts, max_length):
            depth = depth_behind[int(parent[segment[0]])] + 1
            depth_behind[int(segment[-1])] = depth
            by_depth.setdefault(depth, []).append(segment)

        depths, tokens, count = [], list[Tensor](), 0
        token_index, row_index = np.zeros(size, np.int64), np.zeros(u, np.int64)
        for rows in by_depth.values():
            groups, index = group_rows(rows, size)
            parents = [torch.from_numpy(row_index[parent[group[:, 0].numpy()]]) for group in groups]
            shapes = [(len(group), group.shape[1]) for group in groups]
            depths.append(tuple(map(SegmentGroup, shapes, parents)))
            last = torch.cat([group[:, -1] for group in groups]).numpy()
            row_index[last] = np.arange(len(last))
            real = np.concatenate(rows)
            token_index[real] = index.numpy()[real] + count
            tokens += [group.flatten() for group in groups]
            count += sum(group.numel() for group in groups)
        is_padding = np.ones(count, bool)
        is_padding[token_index[:u]] = False
        return cls(tuple(depths), torch.cat(tokens), *map(torch.from_numpy, (is_padding, token_index)))


def find_parents(branches: Sequence[Branch]) -> NDArray[np.int64]:
    """For each token of a tree the one before it on its path, or -1; at the end -1, so that -1 has itself."""
    parent = np.arange(-1, branches[-1][0].stop)
    parent[-1] = -1
    for branch, prefix in branches:
        parent[branch.start] = prefix[-1].stop - 1 if prefix else -1
    return parent


def cut_rows(
    tokens: NDArray[np.int64], starts: NDArray[np.int64], max_length: int | None
) -> list[NDArray[np.int64]]:
    """Cut a row of tokens before these of its tokens, and what is longer into parts of nearly one length."""
    rows = np.split(tokens, starts[1:])
    if max_length is None:
        return rows
    return [part for row in rows for part in np.array_split(row, -(-len(row) // max_length))]
