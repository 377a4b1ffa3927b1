"""Layers with a state over a prefix tree, against the same functions along each path alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_wrapper.prefix_tree import (
    PrefixSharingError,
    PrefixTree,
    TreeLayout,
    TreeOptions,
    convolve_over_tree,
    scan_over_tree,
    shift_over_tree,
)
from dpo_wrapper.prefix_tree.grouping import MAX_PADDING
from dpo_wrapper.prefix_tree.recurrence import branch_heads, find_segments
from helpers.device_waits import DEVICE, DeviceTensor, counted_waits
from helpers.trees import (
    assert_equal_along_paths,
    branching_sequences,
    draw_normal,
    parents_of,
    paths_of,
    random_tree,
    sequence_sets,
)

DOCSTRING = [[1, 2, 3, 4], [1, 2, 24, 25], [5, 6]]
sequences = sequence_sets | branching_sequences()
max_positions = st.none() | st.integers(1, 20)


def layout_of(sequences, max_positions=None):
    tree = PrefixTree.from_sequences([*sequences, [7]])  # at least one token
    return tree, TreeLayout.from_tree(tree, TreeOptions(max_positions))


@given(sequences, max_positions, st.sampled_from([0, 1, 2, 3, 7, 50]))
@settings(max_examples=40)
@example([[7]], None, 1)
@example([[1, 2, 3], [1, 2, 3, 4], [1, 5]], 2, 2)
@example([[1], [2], [3]], None, 3)  # as far as there are tokens
def test_a_shift_is_that_along_each_path(sequences, max_positions, distance):
    tree, layout = layout_of(sequences, max_positions)
    x = draw_normal(*layout.ids.shape, 2)

    def shift(path):
        return F.pad(x.flatten(0, 1)[path], (0, 0, distance, 0))[: len(path)]

    assert_equal_along_paths(tree, shift_over_tree(layout, x, distance), shift, [x])


@given(sequences, max_positions, st.sampled_from([1, 2, 4, 9, 60]))
@settings(max_examples=40)
@example([[7]], None, 4)
@example([[1, 2, 3, 4], [1, 2, 3, 5], [1, 6]], 3, 4)
def test_a_convolution_is_that_along_each_path(sequences, max_positions, width):
    tree, layout = layout_of(sequences, max_positions)
    rows, columns = layout.ids.shape
    x, weight, bias = draw_normal(rows, 3, columns), draw_normal(3, width, seed=2), draw_normal(3, seed=3)

    def convolve(x):
        out = F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=3)
        return F.silu(out[..., : x.shape[-1]])

    def along_path(path):
        return convolve(x.transpose(0, 1).flatten(1)[:, path][None])[0].t()

    out = convolve_over_tree(layout, x, width, convolve)
    assert out.shape == x.shape
    assert_equal_along_paths(tree, out.transpose(1, 2), along_path, [x, weight, bias])


def scan(tokens, state):
    """A recurrence `S = (1 - a) S + b x wᵀ` with outputs `tanh(S y)`, token by token."""
    x, y, a, b = tokens  # [g n d], [g n e], [g n] and [g n]
    outputs = []
    if state is None:
        state = x.new_zeros(len(x), x.shape[2], y.shape[2])
    for k in range(x.shape[1]):
        update = torch.einsum("g, g d, g e -> g d e", b[:, k], x[:, k], y[:, k])
        state = (1 - a[:, k, None, None]) * state + update
        outputs.append(torch.tanh(state @ y[:, k, :, None])[..., 0])
    return torch.stack(outputs, dim=1), state


def scan_inputs(layout):
    """x, y, and the gates a and b; the layout's padding holds what would spoil any state."""
    shape = layout.ids.shape
    tokens = [
        draw_normal(*shape, 3, seed=4),
        draw_normal(*shape, 2, seed=5),
        draw_normal(*shape, seed=6),
        draw_normal(*shape, seed=7),
    ]
    u = len(layout.subtree_end)
    with torch.no_grad():
        for t in tokens:
            t.flatten(0, 1)[u:] = 1e30
    return tokens


@given(sequences, max_positions, st.sampled_from([1, 2, 3, None]))
@settings(max_examples=40)
@example([[7]], 1, None)
@example(DOCSTRING, None, None)
@example([[1, 2, 3, 4], [1, 2, 3], [1, 2, 3], [1, 2, 5, 6, 7, 8, 9]], 3, 2)
def test_a_scan_is_that_along_each_path(sequences, max_positions, max_segment):
    tree, layout = layout_of(sequences, max_positions)
    x, y, a, b = inputs = scan_inputs(layout)
    weight = draw_normal(3, 3, seed=8)  # of the layer, before the scan

    def along_path(path):
        tokens = [t.flatten(0, 1)[path][None] for t in (x @ weight, y, a, b)]
        return scan(tokens, None)[0][0]

    out = scan_over_tree(layout, [x @ weight, y], [a, b], scan, max_segment)
    assert out.shape == x.shape
    assert_equal_along_paths(tree, out, along_path, [*inputs, weight])


def test_every_branch_sends_gradients_into_the_prefix():
    tree, layout = layout_of(DOCSTRING)
    x, y, a, b = scan_inputs(layout)
    out = scan_over_tree(layout, [x, y], [a, b], scan).flatten(0, 1)
    of_branch = [torch.autograd.grad(out[t].sum(), x, retain_graph=True)[0][0] for t in (3, 5)]
    of_both = torch.autograd.grad((out[3] + out[5]).sum(), x)[0][0]
    for grad, path in zip(of_branch, paths_of(tree)[:2], strict=True):
        assert set(grad.abs().sum(-1).nonzero()[:, 0].tolist()) == set(path.tolist())
    torch.testing.assert_close(of_both, sum(of_branch))


def test_each_token_is_computed_once():
    tree = random_tree(3, longest=60)
    layout = TreeLayout.from_tree(tree, TreeOptions())
    counts = []

    def count(tokens, state):
        counts.append(tokens[0].shape[:2].numel())
        return scan(tokens, state)

    x, y, a, b = scan_inputs(layout)
    scan_over_tree(layout, [x, y], [a, b], count)
    assert len(tree.ids) <= sum(counts) <= len(tree.ids) / (1 - MAX_PADDING) < len(tree.path)


def test_gradcheck_passes():
    layout = layout_of(DOCSTRING, 4)[1]

    def over_tree(x, y, a, b, weight):
        shifted = shift_over_tree(layout, x, 2)
        mixed = convolve_over_tree(
            layout,
            (x + shifted).transpose(1, 2),
            3,
            lambda x: F.conv1d(F.pad(x, (2, 0)), weight[:, None], groups=3),
        )
        return scan_over_tree(layout, [mixed.transpose(1, 2), y], [a, b], scan, 1).flatten(0, 1)[:9]

    shape = layout.ids.shape
    inputs = [
        draw_normal(*shape, 3),
        draw_normal(*shape, 2),
        draw_normal(*shape),
        draw_normal(*shape),
        draw_normal(3, 3),
    ]
    assert torch.autograd.gradcheck(over_tree, inputs)


@pytest.mark.parametrize(
    "compute",
    [
        lambda layout, x: shift_over_tree(layout, x, 1),
        lambda layout, x: convolve_over_tree(layout, x.transpose(1, 2), 2, lambda x: x).transpose(1, 2),
        lambda layout, x: scan_over_tree(
            layout, [x], [x], lambda tokens, state: (tokens[0], tokens[0][:, -1])
        ),
    ],
    ids=["shift", "convolution", "recurrence"],
)
def test_the_kernel_is_noted_and_other_rows_are_refused(compute, request):
    layout = layout_of(DOCSTRING)[1]
    name = request.node.callspec.id
    with pytest.raises(PrefixSharingError, match=rf"its (token )?{name} has rows of shape \(1, 10\) for"):
        compute(layout, torch.zeros(1, 10, 2))
    assert not layout.kernels
    assert compute(layout, torch.zeros(1, 9, 2)).shape == (1, 9, 2)
    assert layout.kernels == {"fork"}


@given(sequences, st.integers(1, 6))
@settings(max_examples=50)
def test_heads_of_branches_are_the_tokens_whose_window_leaves_the_branch(sequences, width):
    tree, layout = layout_of(sequences)
    parent, expected = parents_of(tree), {}
    for token in range(len(parent)):
        window = [token]
        while len(window) < width:
            window.insert(0, parent[window[0]] if window[0] >= 0 else -1)
        if window != list(range(token - width + 1, token + 1)) or window[0] < 0:
            expected[token] = window
    tokens, windows = branch_heads(layout, width)
    assert windows.shape == (len(tokens), width)
    assert dict(zip(tokens.tolist(), windows.tolist(), strict=True)) == expected


def test_a_shift_from_tokens_that_follow_is_refused():
    layout = layout_of(DOCSTRING)[1]
    with pytest.raises(PrefixSharingError, match="its token shift looks at the tokens that follow"):
        shift_over_tree(layout, torch.zeros(1, 9, 2), -1)


def test_what_a_layout_needs_is_found_once():
    layout = layout_of(DOCSTRING)[1]
    assert find_segments(layout, 2) is find_segments(layout, 2) is not find_segments(layout, None)
    assert branch_heads(layout, 2) is branch_heads(layout, 2) is not branch_heads(layout, 3)


def test_no_device_is_waited_for():
    layout = layout_of([*DOCSTRING, list(range(9))])[1]
    x, y, a, b = (t.detach() for t in scan_inputs(layout))
    with counted_waits() as waits:
        layout = layout.to(DEVICE)
        x, y, a, b = inputs = [DeviceTensor(t).requires_grad_() for t in (x, y, a, b)]
        shifted = shift_over_tree(layout, x, 2).transpose(1, 2)
        mixed = convolve_over_tree(layout, shifted, 3, lambda t: t.cumsum(-1)).transpose(1, 2)
        scan_over_tree(layout, [mixed, y], [a, b], scan, 2).sum().backward()
        assert not waits
        assert all(t.grad is not None for t in inputs)
        x.sum().item()
    assert waits  # as a wait would have been


def test_a_tree_may_be_evaluated_in_inference_mode_and_then_train():
    _, layout = layout_of(DOCSTRING)
    inputs = draw_normal(*layout.ids.shape, 2), draw_normal(*layout.ids.shape, seed=1)

    def compute():
        def scan(tokens, state):
            out = (tokens[0] * tokens[1][..., None]).cumsum(1) + (0 if state is None else state[:, None])
            return out, out[:, -1]

        return scan_over_tree(layout, [shift_over_tree(layout, inputs[0], 1)], [inputs[1]], scan)

    with torch.inference_mode():
        expected = compute()
    out = compute()
    out.sum().backward()
    assert torch.equal(out, expected)
