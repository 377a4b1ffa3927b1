"""Sequences that share prefixes, random trees of them, and what a tree's paths say."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Generator, Tensor

from dpo_wrapper.prefix_tree import PrefixTree

token_ids = st.integers(0, 2) | st.sampled_from([-(2**63), -256, -1, 255, 256, 2**63 - 1])
"""Few different ids, so that prefixes are shared; now and then the extremes of int64."""

sequence_sets = st.lists(st.lists(token_ids, max_size=8), max_size=12)


@st.composite
def branching_sequences(draw: Callable[..., Any]) -> list[list[int]]:
    """Sequences that begin with prefixes of one another, or end there."""
    rows = [draw(st.lists(token_ids, max_size=12))]
    for _ in range(draw(st.integers(0, 10))):
        other = draw(st.sampled_from(rows))
        shared = draw(st.integers(0, len(other)))
        rows.append(other[:shared] + draw(st.lists(token_ids, max_size=4)))
    return draw(st.permutations(rows))


def random_tree(seed: int, sequences: int = 6, longest: int = 200) -> PrefixTree:
    """Sequences that share beginnings of one stem, over a few ids, so that some share more by chance."""
    generator = Generator().manual_seed(seed)

    def number(high: int) -> int:
        return int(torch.randint(0, high, (), generator=generator))

    stem = torch.randint(0, 3, (longest,), generator=generator)
    tails = [torch.randint(0, 3, (1 + number(longest),), generator=generator) for _ in range(sequences)]
    return PrefixTree.from_sequences([torch.cat([stem[: number(longest)], tail]) for tail in tails])


def paths_of(tree: PrefixTree) -> tuple[Tensor, ...]:
    """The path of each sequence."""
    return tree.path.split(tree.start.diff().tolist())


def sequences_of(tree: PrefixTree) -> list[list[int]]:
    """The ids of the sequences from which the tree was built, in their order."""
    return [tree.ids[path].tolist() for path in paths_of(tree)]


def attention_mask(tree: PrefixTree) -> Tensor:
    """Bool[u u], True where token q (row) may attend to token k (column)."""
    index = torch.arange(len(tree.ids))
    return (index <= index[:, None]) & (index[:, None] < tree.subtree_end)


def nodes_of(tree: PrefixTree) -> list[Any]:
    """For each token the ids from the root to it, read off the paths."""
    nodes: list[Any] = [None] * len(tree.ids)
    for path in paths_of(tree):
        for n, token in enumerate(path.tolist(), start=1):
            node = tuple(tree.ids[path[:n]].tolist())
            assert nodes[token] in (None, node)
            nodes[token] = node
    return nodes


def parents_of(tree: PrefixTree) -> list[int]:
    """For each token the one before it, or -1, read off the paths."""
    parents = [-1] * len(tree.ids)
    for path in paths_of(tree):
        for before, token in pairwise(path.tolist()):
            assert parents[token] in (-1, before)
            parents[token] = before
    return parents


def draw_normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64, which need a gradient."""
    numbers = torch.randn(shape, generator=Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.requires_grad_()


def assert_equal_along_paths(
    tree: PrefixTree, out: Tensor, along_path: Callable[[Tensor], Tensor], inputs: list[Tensor]
) -> None:
    """Compare outputs [r w ...] over a tree, and gradients of the inputs, with those along each path alone.

    `along_path` takes the indices of a path's tokens. The loss weights each token of each path by itself.
    """
    paths = [path for path in paths_of(tree) if len(path)]
    flat = out.flatten(0, 1)
    results = []
    for function in (lambda path: flat.index_select(0, path), along_path):
        outputs = torch.cat([function(path) for path in paths])
        loss = (outputs * draw_normal(*outputs.shape, seed=1).detach()).sum()
        results.append((outputs, *torch.autograd.grad(loss, inputs, retain_graph=True)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
