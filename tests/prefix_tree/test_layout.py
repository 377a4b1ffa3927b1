"""`TreeLayout` against brute force."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_wrapper.prefix_tree import PrefixTree, TreeLayout, TreeOptions
from dpo_wrapper.prefix_tree.grouping import MAX_PADDING
from helpers.trees import branching_sequences, sequence_sets


@settings(max_examples=200)
@given(sequence_sets | branching_sequences(), st.none() | st.integers(1, 20))
@example([[7]], None)
@example([[7]], 1)
@example([[1, 2, 3, 4, 5], [9], [8], [7, 6]], 4)
def test_the_layout_holds_every_token_and_groups_are_paths(sequences, max_positions):
    tree = PrefixTree.from_sequences(sequences)
    u = len(tree.ids)
    if not u:
        return
    layout = TreeLayout.from_tree(tree, TreeOptions(max_positions))
    rows, width = layout.ids.shape
    assert layout.position.shape == (rows, width)
    assert max_positions is None or width <= max_positions
    assert max_positions is not None or rows == 1
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


def test_moving_a_layout_keeps_everything():
    layout = TreeLayout.from_tree(
        PrefixTree.from_sequences([[1, 2, 3, 4], [1, 2, 24, 25], [5, 6]]), TreeOptions(3)
    )
    moved = layout.to("meta")
    assert moved.ids.shape == layout.ids.shape == (3, 3)
    for tensor in (moved.ids, moved.position, moved.path_index, *moved.groups):
        assert tensor.device.type == "meta"
    assert [group.shape for group in moved.groups] == [group.shape for group in layout.groups]
