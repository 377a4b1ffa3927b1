"""`PrefixTree`, `TreeLayout` and `ScoredTree` against a naive trie and brute force."""

import time

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Generator

from dpo_wrapper.batches.sequences import PreferenceBatch, ScoredSequences, ScoredTree
from dpo_wrapper.prefix_tree import PrefixTree, TreeLayout, TreeOptions
from dpo_wrapper.prefix_tree.layout import MAX_PADDING
from helpers.batches import random_batch
from helpers.trees import branching, sequence_sets

A, B, C = [1, 2, 3, 4], [1, 2, 24, 25], [5, 6]  # the sequences drawn in the module's docstring

# few different ids, so that prefixes are shared; now and then the extremes of int64


def trie(sequences):
    """Its nodes: the tuple of ids from the root to each token."""
    return {tuple(row[:n]) for row in sequences for n in range(1, len(row) + 1)}


def paths_of(tree):
    return tree.path.split(tree.start.diff().tolist())


def nodes_of(tree):
    """The node of the trie that each token stands for, read off the paths."""
    nodes = [None] * len(tree.ids)
    for path in paths_of(tree):
        for n, token in enumerate(path.tolist(), start=1):
            node = tuple(tree.ids[path[:n]].tolist())
            assert nodes[token] in (None, node)
            nodes[token] = node
    return nodes


def random_sequences(generator, count, longest, vocab=3):
    lengths = torch.randint(0, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


# the tree


@settings(max_examples=200, deadline=None)
@given(sequence_sets | branching())
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
    assert [row.tolist() for row in tree.sequences()] == sequences
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


@settings(max_examples=100, deadline=None)
@given(sequence_sets | branching())
def test_a_token_attends_to_its_own_path_and_to_nothing_else(sequences):
    tree = PrefixTree.from_sequences(sequences)
    nodes, seen = nodes_of(tree), tree.attention_mask()
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
    assert [row.tolist() for row in tree.sequences()] == rows
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


# its layout


@settings(max_examples=200, deadline=None)
@given(sequence_sets | branching(), st.none() | st.integers(1, 20))
@example([[7]], None)
@example([[7]], 1)
@example([[1, 2, 3, 4, 5], [9], [8], [7, 6]], 4)
def test_the_layout_holds_every_token_and_groups_are_paths(sequences, most):
    tree = PrefixTree.from_sequences(sequences)
    u = len(tree.ids)
    if not u:
        return
    layout = TreeLayout.from_tree(tree, TreeOptions(most))
    rows, width = layout.shape
    assert layout.ids.shape == layout.position.shape == layout.shape
    assert most is None or width <= most
    assert most is not None or rows == 1
    assert u <= rows * width < u + rows and width * (rows - 1) < u  # no empty row, little padding
    assert torch.equal(layout.ids.flatten()[:u], tree.ids)
    assert torch.equal(layout.position.flatten()[:u], tree.position)
    assert not layout.position.flatten()[u:].any()

    end_to_end = torch.cat([group.flatten() for group in layout.groups])
    assert layout.path_index.shape == (rows * width,)
    assert torch.equal(end_to_end[layout.path_index[:u]], torch.arange(u))
    assert ((layout.path_index >= 0) & (layout.path_index < len(end_to_end))).all()

    leaf_paths = {tuple(path.tolist()) for path in tree.leaf_paths()}
    found, place, column = [], 0, {}
    for group in layout.groups:
        real = 0
        for row in group.tolist():
            n = row.index(row[-1]) + 1  # from its own last token on there is padding
            assert tuple(row[:n]) in leaf_paths and row[n:] == [row[-1]] * (len(row) - n)
            found.append(tuple(row[:n]))
            real += n
            for k in range(len(row)):
                column[place + k] = k, k < n
            place += len(row)
        assert real >= (1 - MAX_PADDING) * group.numel()
    assert sorted(found) == sorted(leaf_paths)
    for token in range(u):  # its index is where the causal past is the token's own path
        assert column[int(layout.path_index[token])] == (int(tree.position[token]), True)


def test_moving_a_layout_or_scored_tree_keeps_everything():
    layout = TreeLayout.from_tree(PrefixTree.from_sequences([A, B, C]), TreeOptions(3))
    moved = layout.to("meta")
    assert moved.shape == layout.shape == (3, 3)
    for tensor in (moved.ids, moved.position, moved.path_index, *moved.groups):
        assert tensor.device.type == "meta"
    assert [group.shape for group in moved.groups] == [group.shape for group in layout.groups]

    sequences = scored_sequences(0)
    tree = sequences.over_tree(TreeOptions(5))
    assert sequences.over_tree(TreeOptions(5)) is tree and sequences.over_tree(TreeOptions()) is not tree
    for twin in (tree.to("meta"), sequences.to("meta").over_tree(TreeOptions(5))):
        assert twin.unique == tree.unique
        for tensor in (twin.source, twin.target, twin.entry, twin.layout.ids):
            assert tensor.device.type == "meta"


# what is scored in it


def scored_sequences(seed, **kwargs):
    case = random_batch(Generator().manual_seed(seed), vocab=4, b=5, **kwargs)
    sides = (case.preferred_seq, case.unpreferred_seq)
    return PreferenceBatch.from_padded(sides, case.prompt_masks, case.seq_masks).sequences


def score_of(past, target):
    """A number that tells pasts and targets apart: any table would do."""
    return hash((*past, -7, target)) % 1000003 / 1000


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("most", [None, 4])
def test_scores_come_back_to_the_sequences_they_belong_to(seed, most):
    sequences = scored_sequences(seed)
    tree = ScoredTree.of(sequences, TreeOptions(most))
    real, rows = PrefixTree.from_sequences(sequences.inputs()), sequences.inputs()
    assert tree.unique == len(real.ids) == sequences.unique_tokens()
    nodes = nodes_of(real)
    table = [score_of(nodes[k], t) for k, t in zip(tree.source.tolist(), tree.target.tolist(), strict=True)]
    got = sequences.sums(torch.tensor(table, dtype=torch.float64)[tree.entry])

    expected, different = torch.zeros(len(rows), dtype=torch.float64), set()
    scored = (sequences.row.tolist(), sequences.source.tolist(), sequences.target.tolist())
    for row, source, target in zip(*scored, strict=True):
        past = tuple(rows[row][: source + 1].tolist())
        different.add((past, target))
        expected[row] += score_of(past, target)
    assert torch.allclose(got, expected, atol=1e-9, rtol=0)
    assert len(table) == len(different)  # what two sequences score is scored once


def test_equal_sequences_are_laid_and_scored_once():
    seq = torch.tensor([[3, 1, 2, 5]] * 4)
    all_of_it = torch.ones_like(seq, dtype=torch.bool)
    tree = ScoredTree.of(ScoredSequences.from_padded(seq, all_of_it, all_of_it), TreeOptions())
    assert tree.unique == 3 and tree.target.tolist() == [1, 2, 5]
    assert tree.entry.tolist() == [0, 1, 2] * 4 and tree.layout.groups[0].shape == (1, 3)


def test_one_token_with_two_targets_and_two_tokens_with_one():
    seq = torch.tensor([[3, 1], [3, 2], [4, 1]])
    all_of_it = torch.ones_like(seq, dtype=torch.bool)
    tree = ScoredTree.of(ScoredSequences.from_padded(seq, all_of_it, all_of_it), TreeOptions())
    assert tree.unique == 2
    pairs = list(zip(tree.source.tolist(), tree.target.tolist(), strict=True))
    assert [pairs[k] for k in tree.entry.tolist()] == [(0, 1), (0, 2), (1, 1)]
