"""`PrefixTree` against a naive trie."""

import time

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from torch import Generator

from dpo_wrapper.prefix_tree import PrefixTree
from helpers.trees import attention_mask, branching_sequences, nodes_of, paths_of, sequence_sets, sequences_of

A, B, C = [1, 2, 3, 4], [1, 2, 24, 25], [5, 6]  # the sequences drawn in the module's docstring


def trie(sequences):
    """Its nodes: the tuple of ids from the root to each token."""
    return {tuple(row[:n]) for row in sequences for n in range(1, len(row) + 1)}


def random_sequences(generator, count, longest, vocab=3):
    lengths = torch.randint(0, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


@settings(max_examples=200)
@given(sequence_sets | branching_sequences())
@example([])
@example([[]])
@example([[], [], []])
@example([[7]])
@example([[7], [7], []])
@example([[1, 2, 3], [1, 2], [1], [1, 2, 3]])
@example([[-1], [0], [-(2**63)], [2**63 - 1]])
@example([[1, 256], [256, 1], [1], [256]])
def test_the_tree_is_the_trie(sequences):
    tree = PrefixTree.from_sequences(sequences)
    expected = trie(sequences)
    assert sequences_of(tree) == sequences
    assert len(tree.ids) == len(expected)

    nodes = nodes_of(tree)
    assert set(nodes) == expected  # each once, and none that no sequence has
    for token, node in enumerate(nodes):
        assert tree.ids[token] == node[-1]
        assert tree.position[token] == len(node) - 1
        below = [k for k, other in enumerate(nodes) if other[: len(node)] == node]
        assert below == list(range(token, tree.subtree_end[token]))  # depth first: a subtree is one run

    leaves = [node for node in expected if sum(other[: len(node)] == node for other in expected) == 1]
    leaf_paths = [tuple(tree.ids[path].tolist()) for path in tree.leaf_paths()]
    assert sorted(leaf_paths) == sorted(leaves)


@settings(max_examples=100)
@given(sequence_sets | branching_sequences())
def test_a_token_attends_to_its_own_path_and_to_nothing_else(sequences):
    tree = PrefixTree.from_sequences(sequences)
    nodes, seen = nodes_of(tree), attention_mask(tree)
    assert seen.shape == (len(nodes), len(nodes))
    for q, row in enumerate(nodes):
        for k, column in enumerate(nodes):
            assert seen[q, k] == (row[: len(column)] == column)


def test_the_example_drawn_in_the_docstring():
    tree = PrefixTree.from_sequences([A, B, C])
    assert tree.ids.tolist() == [1, 2, 3, 4, 24, 25, 5, 6]
    assert tree.position.tolist() == [0, 1, 2, 3, 2, 3, 0, 1]
    assert tree.subtree_end.tolist() == [6, 6, 4, 4, 6, 6, 8, 8]
    assert [path.tolist() for path in paths_of(tree)] == [[0, 1, 2, 3], [0, 1, 4, 5], [6, 7]]


@pytest.mark.parametrize("kind", [torch.tensor, np.array, tuple, list, lambda r: torch.tensor(r).int()])
def test_tensors_arrays_and_lists_make_the_same_tree(kind):
    tree = PrefixTree.from_sequences([kind(row) for row in (A, B, C)])
    assert torch.equal(tree.path, PrefixTree.from_sequences([A, B, C]).path)
    assert tree.ids.dtype == tree.path.dtype == torch.long


def test_the_order_of_sequences_changes_only_the_order_of_paths():
    rows = random_sequences(Generator().manual_seed(0), 30, 6)
    tree, turned = PrefixTree.from_sequences(rows), PrefixTree.from_sequences(rows[::-1])
    for name in ("ids", "position", "subtree_end"):
        assert torch.equal(getattr(tree, name), getattr(turned, name))
    for one, other in zip(paths_of(tree), paths_of(turned)[::-1], strict=True):
        assert torch.equal(one, other)


def test_two_hundred_sequences():
    rows = random_sequences(Generator().manual_seed(1), 200, 30)
    rows[10:20], rows[30] = rows[:10], []
    tree = PrefixTree.from_sequences(rows)
    assert sequences_of(tree) == rows
    assert set(nodes_of(tree)) == trie(rows) and len(tree.ids) == len(trie(rows))


def test_a_tree_of_64_long_sequences_takes_milliseconds():
    rows = list(torch.randint(1000, (64, 512), generator=Generator().manual_seed(2)))
    for row in rows[1:]:
        row[:200] = rows[0][:200]
    times = []
    for _ in range(5):
        began = time.perf_counter()
        PrefixTree.from_sequences(rows)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.02  # it is under 5 ms where nothing else runs
