"""Layers over a prefix tree that carry something along the sequence: a state, or the inputs of a convolution.

This is, like `attention`, for models that know nothing of trees. Each token is computed once: a branch begins
with the state, or the inputs, at its fork. A layer that cannot be told to begin with a state runs along the
paths instead, by `run_along_paths`.
"""

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpo_wrapper.prefix_tree.layout import TreeLayout
from dpo_wrapper.prefix_tree.paths import PrefixSharingError, check_rows, note_kernel
from dpo_wrapper.prefix_tree.segments import TreeSegments, find_parents

Scan = Callable[[tuple[Tensor, ...], Tensor | None], tuple[Tensor, Tensor]]
"""Maps the inputs [g n ...] of tokens and the state [g ...] before the first of them, or None for zeros, to
outputs [g n ...] and the state behind the last."""


def shift_over_tree(layout: TreeLayout, x: Float[Tensor, "r w d"], distance: int) -> Float[Tensor, "r w d"]:
    """What stands `distance` tokens before each token on its path; zeros where nothing does."""
    check_rows(layout, x.shape[:2], "token shift")
    if distance < 0:
        raise PrefixSharingError("its token shift looks at the tokens that follow")
    note_kernel(layout, "fork")
    tokens, windows = branch_heads(layout, distance + 1)
    flat = x.flatten(0, 1)
    heads = gather_or_zeros(flat, windows[:, 0])  # among them all tokens that `roll` moves round the end
    return flat.roll(distance, 0).index_copy(0, tokens, heads).view_as(x)


def convolve_over_tree(
    layout: TreeLayout,
    x: Float[Tensor, "r c w"],
    width: int,
    convolve: Callable[[Float[Tensor, "b c n"]], Float[Tensor, "b c n"]],
) -> Float[Tensor, "r c w"]:
    """Compute a causal convolution, in which a token meets `width - 1` tokens before it, over a tree.

    It runs over the tree's row as it is, and again for the first tokens of each branch, with those that stand
    before them on their paths.
    """
    check_rows(layout, (x.shape[0], x.shape[2]), "convolution")
    note_kernel(layout, "fork")
    row = x.transpose(0, 1).flatten(1)
    out = convolve(row[None])[0]
    tokens, windows = branch_heads(layout, width)
    inputs = gather_or_zeros(row.t(), windows.flatten()).unflatten(0, windows.shape)
    heads = convolve(inputs.transpose(1, 2))[..., -1]
    return out.index_copy(1, tokens, heads.t()).unflatten(1, (x.shape[0], -1)).transpose(0, 1)


def scan_over_tree(
    layout: TreeLayout,
    inputs: Sequence[Float[Tensor, "r w ..."]],
    gates: Sequence[Float[Tensor, "r w ..."]],
    scan: Scan,
    max_segment: int | None = None,
) -> Float[Tensor, "r w ..."]:
    """Compute a recurrence over a tree, each segment from the state behind the one before it on its path.

    Args:
        inputs: what `scan` takes of each token.
        gates: what it takes after these. A token whose gates are all zero should leave the state as it is: so
            do those that pad a segment.
        scan: computes the recurrence over ordinary sequences.
        max_segment: the longest segments; None for as long as they are.
    """
    check_rows(layout, inputs[0].shape[:2], "recurrence")
    note_kernel(layout, "fork")
    segments = find_segments(layout, max_segment)
    tokens = [t.flatten(0, 1).index_select(0, segments.tokens) for t in (*inputs, *gates)]
    for k in range(len(inputs), len(tokens)):
        is_padding = segments.is_padding.view(-1, *[1] * (tokens[k].dim() - 1))
        tokens[k] = tokens[k].masked_fill(is_padding, 0.0)
    shapes = [shape for depth in segments.depths for shape in depth]
    parents = segments.parents.split([rows for rows, _ in shapes])
    pieces = zip(parents, *(t.split([rows * n for rows, n in shapes]) for t in tokens), strict=True)
    outputs: list[Tensor] = []
    states_behind: list[Tensor] = []
    for depth in segments.depths:
        states = torch.cat(states_behind) if states_behind else None
        states_behind = []
        for shape in depth:
            before, *rows = next(pieces)
            state = None if states is None else states.index_select(0, before)
            out, state_behind = scan(tuple(t.unflatten(0, shape) for t in rows), state)
            outputs.append(out.flatten(0, 1))
            states_behind.append(state_behind)
    return torch.cat(outputs).index_select(0, segments.token_index).unflatten(0, layout.ids.shape)


def find_segments(layout: TreeLayout, max_length: int | None) -> TreeSegments:
    """The tree's segments, found once for each `max_length`."""

    def find() -> TreeSegments:
        size, device = layout.ids.numel(), layout.ids.device
        return TreeSegments.from_branches(layout.branches, size, max_length).to(device)

    return layout.remember(("segments", max_length), find)


def branch_heads(layout: TreeLayout, width: int) -> tuple[Int[Tensor, "m"], Int[Tensor, "m {width}"]]:
    """The tokens with less than `width - 1` tokens of their branch before them, and the window of each.

    That is the token and the `width - 1` before it on its path, -1 where there is none.
    """

    def find() -> tuple[Tensor, Tensor]:
        parent = find_parents(layout.branches)
        heads = (range(b.start, min(b.stop, b.start + width - 1)) for b, _ in layout.branches)
        windows = [np.fromiter(chain.from_iterable(heads), np.int64)]
        for _ in range(width - 1):
            windows.append(parent[windows[-1]])
        arrays = windows[0], np.stack(windows[::-1], axis=1)
        first, second = (torch.from_numpy(x).to(layout.ids.device, non_blocking=True) for x in arrays)
        return first, second

    return layout.remember(("branch heads", width), find)


def gather_or_zeros(x: Float[Tensor, "u d"], index: Int[Tensor, "k"]) -> Float[Tensor, "k d"]:
    """The rows of x with these indices; zeros for -1."""
    return x.index_select(0, index.clamp(min=0)).masked_fill(index[:, None] < 0, 0.0)
