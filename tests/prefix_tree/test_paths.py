"""What runs along the paths of a tree, against each path alone."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_wrapper.prefix_tree import PrefixSharingError, PrefixTree, TreeLayout, TreeOptions, run_along_paths
from dpo_wrapper.prefix_tree.paths import check_rows, note_kernel
from helpers.trees import assert_equal_along_paths, branching_sequences, draw_normal, sequence_sets


@given(sequence_sets | branching_sequences(), st.none() | st.integers(1, 20))
@settings(max_examples=40)
@example([[7]], 1)
@example([[1, 2, 3], [1, 2], [1, 2], [1, 4]], 2)
def test_a_causal_function_runs_along_each_path(sequences, max_positions):
    tree = PrefixTree.from_sequences([*sequences, [7]])  # at least one token
    layout = TreeLayout.from_tree(tree, TreeOptions(max_positions))
    x, gate = draw_normal(*layout.ids.shape, 2, 3), draw_normal(*layout.ids.shape, seed=1)

    def causal(x, gate):
        return (x * gate[..., None, None]).cumsum(1).sum(-1)

    out = run_along_paths(layout, [x, gate], causal)
    assert out.shape == x.shape[:3]

    def along_path(path):
        return causal(*(t.flatten(0, 1)[path][None] for t in (x, gate)))[0]

    assert_equal_along_paths(tree, out, along_path, [x, gate])


def test_rows_other_than_those_of_the_tree_are_refused():
    layout = TreeLayout.from_tree(PrefixTree.from_sequences([[1, 2, 3], [1, 4]]), TreeOptions(2))
    check_rows(layout, torch.Size((2, 2)))
    with pytest.raises(
        PrefixSharingError, match=r"its scan has rows of shape \(1, 4\) for tokens in \(2, 2\)"
    ):
        check_rows(layout, (1, 4), "scan")


def test_kernels_are_noted():
    layout = TreeLayout.from_tree(PrefixTree.from_sequences([[1, 2]]), TreeOptions())
    assert layout.kernels == set()
    note_kernel(layout, "fork")
    note_kernel(layout, "paths")
    assert layout.kernels == {"fork", "paths"}
