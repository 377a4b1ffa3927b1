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
class TreeSegments(TensorDataclass):
    """The segments of a tree whose layout has `rw` tokens, as `g` rows in groups.

    Attributes:
        depths: for each depth, from the roots on, the shapes of its groups: how many rows of how many tokens.
        parents: for each row of all groups the index of the segment before it, among the rows of the depth
            above; zeros for segments at a root.
        tokens: the indices of the tokens of all groups, row after row. A shorter segment is padded with its
            own last token.
        is_padding: whether each of these pads a row.
        token_index: for each token of the layout, its place among `tokens`; 0 for the layout's own padding.
    """

    depths: tuple[tuple[tuple[int, int], ...], ...]
    parents: Int[Tensor, "g"]
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

        depths, groups, parents, row_index = [], [], [], np.zeros(u, np.int64)
        for segments in by_depth.values():
            at_depth = [group.numpy() for group in group_rows(segments, u)[0]]
            first, last = (np.concatenate([group[:, k] for group in at_depth]) for k in (0, -1))
            parents.append(row_index[parent[first]])
            row_index[last] = np.arange(len(last))
            depths.append(tuple((len(group), group.shape[1]) for group in at_depth))
            groups += at_depth
        tokens = np.concatenate([group.ravel() for group in groups])
        places, token_index = np.arange(len(tokens)), np.zeros(size, np.int64)
        token_index[tokens[::-1]] = places[::-1]  # the first place of each token: the others are padding
        is_padding = token_index[tokens] != places
        arrays = np.concatenate(parents), tokens, is_padding, token_index
        return cls(tuple(depths), *map(torch.from_numpy, arrays))


def find_parents(branches: Sequence[Branch]) -> NDArray[np.int64]:
    """For each token of a tree the one before it on its path, or -1; and another -1, as what is before -1."""
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
