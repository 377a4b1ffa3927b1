"""Rows of tokens, such as the paths of a tree, in groups of similar length."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

MAX_PADDING = 0.15
"""The share of padding in a group of rows above which the next row opens another group."""


def group_rows(
    rows: Sequence[NDArray[np.int64]], size: int
) -> tuple[tuple[Int[Tensor, "g n"], ...], Int[Tensor, "rw"]]:
    """Group rows of indices of `size` tokens, the longest first; a shorter row is padded with its last token.

    Returns the groups, and for each token its index in the flattened groups, one after another. A token in
    several rows has the index in one of them, a token in none has 0.
    """
    rows = sorted(rows, key=len)
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    starts, tokens = lengths.cumsum() - lengths, np.concatenate(rows)
    groups: list[Tensor] = []
    index, offset, end = np.zeros(size, dtype=np.int64), 0, len(rows)
    while end:
        longest = lengths[end - 1]
        means = lengths[:end][::-1].cumsum() / np.arange(1, end + 1)
        count = int((means >= (1 - MAX_PADDING) * longest).sum())
        start, length = (values[end - count : end, None] for values in (starts, lengths))
        columns = np.arange(longest)
        group = tokens[start + np.minimum(columns, length - 1)]
        is_real = columns < length
        index[group[is_real]] = offset + is_real.ravel().nonzero()[0]
        groups.append(torch.from_numpy(group))
        offset += group.size
        end -= count
    return tuple(groups), torch.from_numpy(index)
