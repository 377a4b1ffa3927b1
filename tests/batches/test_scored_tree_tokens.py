"""`ScoredTreeTokens` against brute force: what is scored on a tree comes back to its sequences."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Generator

from dpo_wrapper import PreferenceBatch
from dpo_wrapper.batches.sequences import ScoredSequences, ScoredTreeTokens, unique_pairs
from dpo_wrapper.prefix_tree import PrefixTree, TreeOptions
from helpers.batches import random_batch
from helpers.trees import nodes_of


def scored_sequences(seed, **kwargs):
    case = random_batch(Generator().manual_seed(seed), vocab=4, b=5, **kwargs)
    sides = (case.preferred_seq, case.unpreferred_seq)
    return PreferenceBatch.from_padded(sides, case.prompt_masks, case.seq_masks).sequences


def test_a_tree_is_built_once_for_each_of_the_options_and_moves_with_the_sequences():
    sequences = scored_sequences(0)
    tree = sequences.as_tree(TreeOptions(5))
    assert sequences.as_tree(TreeOptions(5)) is tree and sequences.as_tree(TreeOptions()) is not tree
    for twin in (tree.to("meta"), sequences.to("meta").as_tree(TreeOptions(5))):
        assert len(twin.layout.subtree_end) == len(tree.layout.subtree_end)
        for tensor in (twin.source, twin.target, twin.entry, twin.layout.ids):
            assert tensor.device.type == "meta"


def test_a_tree_that_is_built_in_inference_mode_may_train_later():
    with torch.inference_mode():
        tree = scored_sequences(0).as_tree(TreeOptions())
    fields = tree.source, tree.target, tree.entry, tree.count, tree.layout.ids, *tree.layout.groups
    assert not any(tensor.is_inference() for tensor in fields)


def score_of(past, target):
    """A number that tells pasts and targets apart: any table would do."""
    return hash((*past, -7, target)) % 1000003 / 1000


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("max_positions", [None, 4])
def test_scores_come_back_to_the_sequences_they_belong_to(seed, max_positions):
    sequences = scored_sequences(seed)
    tree = ScoredTreeTokens.from_sequences(sequences, TreeOptions(max_positions))
    real, rows = PrefixTree.from_sequences(sequences.unpadded_rows()), sequences.unpadded_rows()
    assert len(tree.layout.subtree_end) == len(real.ids) == sequences.unique_tokens()
    nodes = nodes_of(real)
    table = [score_of(nodes[k], t) for k, t in zip(tree.source.tolist(), tree.target.tolist(), strict=True)]
    got = sequences.sum_per_sequence(torch.tensor(table, dtype=torch.float64)[tree.entry])

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
    all_true = torch.ones_like(seq, dtype=torch.bool)
    tree = ScoredTreeTokens.from_sequences(
        ScoredSequences.from_padded(seq, all_true, all_true), TreeOptions()
    )
    assert len(tree.layout.subtree_end) == 3 and tree.target.tolist() == [1, 2, 5]
    assert tree.entry.tolist() == [0, 1, 2] * 4 and tree.layout.groups[0].shape == (1, 3)


def test_one_token_with_two_targets_and_two_tokens_with_one():
    seq = torch.tensor([[3, 1], [3, 2], [4, 1]])
    all_true = torch.ones_like(seq, dtype=torch.bool)
    tree = ScoredTreeTokens.from_sequences(
        ScoredSequences.from_padded(seq, all_true, all_true), TreeOptions()
    )
    assert len(tree.layout.subtree_end) == 2
    pairs = list(zip(tree.source.tolist(), tree.target.tolist(), strict=True))
    assert [pairs[k] for k in tree.entry.tolist()] == [(0, 1), (0, 2), (1, 1)]


@given(
    st.lists(st.tuples(st.integers(0, 3) | st.integers(0, 2**20), st.integers(-2, 3) | st.integers(0, 2**20)))
)
@example([])
@example([(0, -1), (1, -1), (0, 5)])
def test_unique_pairs_are_those_of_torch(pairs):
    columns = torch.tensor(pairs, dtype=torch.long).view(-1, 2).T
    first, second, index = unique_pairs(*columns)
    if not pairs:
        assert len(first) == len(second) == len(index) == 0
        return
    expected, expected_index = torch.unique(columns, dim=1, return_inverse=True)
    assert torch.equal(torch.stack([first, second]), expected) and torch.equal(index, expected_index)


def test_laying_out_compares_no_columns(monkeypatch):
    """`torch.unique(dim=1)` compares columns one by one: 50 times the time of one key for each pair."""

    def unique(values, *args, dim=None, **kwargs):
        assert dim is None
        return plain_unique(values, *args, **kwargs)

    plain_unique = torch.unique
    monkeypatch.setattr(torch, "unique", unique)
    sequences = PreferenceBatch.from_lists([[1, 2], [1, 2]], [[3], [4, 5]], [[4], [4]]).sequences
    assert len(ScoredTreeTokens.from_sequences(sequences, TreeOptions()).target) == 3
