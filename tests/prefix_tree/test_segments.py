"""`TreeSegments` against brute force."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_wrapper.prefix_tree import PrefixTree, TreeLayout, TreeOptions
from dpo_wrapper.prefix_tree.grouping import MAX_PADDING
from dpo_wrapper.prefix_tree.segments import TreeSegments, find_parents
from helpers.trees import branching_sequences, parents_of, random_tree, sequence_sets


def find_segments(tree, max_positions=None, max_length=None):
    layout = TreeLayout.from_tree(tree, TreeOptions(max_positions))
    return TreeSegments.from_branches(layout.branches, layout.ids.numel(), max_length)


def segments_of(segments):
    """For each depth its segments, in the order of their rows, and the parent that each row names."""
    tokens = list(zip(segments.tokens.tolist(), segments.is_padding.tolist(), strict=True))
    parents, depths = segments.parents.tolist(), []
    for depth in segments.depths:
        rows = []
        for count, length in depth:
            group, tokens = tokens[: count * length], tokens[count * length :]
            assert sum(is_padding for _, is_padding in group) <= MAX_PADDING * len(group)
            for start in range(0, len(group), length):
                row = group[start : start + length]
                real = [token for token, is_padding in row if not is_padding]
                # padding follows what is real, and repeats its last token
                assert row == [(t, False) for t in real] + [(real[-1], True)] * (length - len(real))
                rows.append(real)
        depths.append((rows, parents[: len(rows)]))
        parents = parents[len(rows) :]
    assert not tokens and not parents
    return depths


def test_the_segments_of_the_tree_in_the_docstring():
    tree = PrefixTree.from_sequences([[1, 2, 3, 4], [1, 2, 24, 25], [5, 6]])
    expected = [([[0, 1], [6, 7]], [0, 0]), ([[2, 3], [4, 5]], [0, 0])]
    assert segments_of(find_segments(tree)) == expected


@settings(max_examples=100)
@given(sequence_sets | branching_sequences(), st.none() | st.integers(1, 20), st.none() | st.integers(1, 5))
@example([[7]], None, None)
@example([[7]], 1, 1)
@example([[1, 2, 3], [1, 2, 3], [1, 2]], None, None)
@example([[1, 2, 3, 4, 5], [9], [8], [7, 6]], 4, 2)
def test_segments_are_runs_behind_their_parents(sequences, max_positions, max_length):
    tree = PrefixTree.from_sequences(sequences)
    u, parent = len(tree.ids), parents_of(tree)
    if not u:
        return
    segments = find_segments(tree, max_positions, max_length)
    depths = segments_of(segments)
    assert sorted(token for rows, _ in depths for row in rows for token in row) == list(range(u))

    rows_above = []
    for rows, parents in depths:
        for row, index in zip(rows, parents, strict=True):
            before = rows_above[index][-1] if rows_above else -1
            for token in row:  # each but the last has one child, the next
                assert parent[token] == before
                assert token == row[-1] or parent.count(token) == 1
                before = token
            assert max_length is None or len(row) <= max_length
            if max_length is None:  # it cannot be longer
                assert parent.count(row[-1]) != 1
        rows_above = rows

    tokens, places = segments.tokens, segments.token_index
    assert torch.equal(tokens[places[:u]], torch.arange(u)) and not segments.is_padding[places[:u]].any()
    assert not places[u:].any()


@given(sequence_sets | branching_sequences())
@settings(max_examples=50)
def test_parents_are_those_on_the_paths(sequences):
    tree = PrefixTree.from_sequences(sequences)
    if len(tree.ids):
        branches = TreeLayout.from_tree(tree, TreeOptions()).branches
        assert find_parents(branches).tolist() == [*parents_of(tree), -1]


def test_long_segments_are_cut_into_nearly_equal_parts():
    tree = PrefixTree.from_sequences([list(range(10))])
    depths = segments_of(find_segments(tree, max_length=4))
    assert [rows for rows, _ in depths] == [[[0, 1, 2, 3]], [[4, 5, 6]], [[7, 8, 9]]]


def test_moving_segments_keeps_everything():
    segments = find_segments(random_tree(0, longest=20), max_length=5)
    moved = segments.to("meta")
    assert moved.depths == segments.depths
    for before, after in zip(segments.iterate_tensors(), moved.iterate_tensors(), strict=True):
        assert after.device.type == "meta" and after.shape == before.shape and after.dtype == before.dtype
    assert segments_of(segments.map_tensors(torch.clone)) == segments_of(segments)
