"""Attention branch by branch, against the rule of the tree as a dense mask."""

from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator
from torch.nn.functional import scaled_dot_product_attention

from dpo_wrapper import DPO
from dpo_wrapper.prefix_tree import PrefixTree, TreeLayout, TreeOptions, attend_with_kernel, cpu_attention
from dpo_wrapper.prefix_tree.cpu_attention import attend_by_branch, find_branches
from helpers.batches import random_batch
from helpers.dpo_calls import arguments
from helpers.kernels import tree_kernels
from helpers.models import ZOO
from helpers.trees import attention_mask, branching_sequences, random_tree, sequence_sets


def tokens(slices):
    return [token for run in slices for token in range(run.start, run.stop)]


def inputs(u, heads, width=8, dtype=torch.float64):
    drawn = (torch.randn(1, n, u, width, generator=Generator().manual_seed(n), dtype=dtype) for n in heads)
    return [t.requires_grad_() for t in drawn]


def test_the_branches_of_the_tree_in_the_docstring():
    tree = PrefixTree.from_sequences([[1, 2, 3, 4], [1, 2, 24, 25], [5, 6]])
    expected = ((slice(0, 4), ()), (slice(4, 6), (slice(0, 2),)), (slice(6, 8), ()))
    assert find_branches(tree.position) == expected


@given(sequence_sets | branching_sequences())
@settings(max_examples=200)
def test_branches_lie_end_to_end_and_continue_their_prefix(sequences):
    tree = PrefixTree.from_sequences(sequences)
    branches = find_branches(tree.position)
    assert tokens(branch for branch, _ in branches) == list(range(len(tree.ids)))
    mask = attention_mask(tree)
    for branch, prefix in branches:
        path = mask[branch.start].nonzero()[:, 0].tolist()
        assert [*tokens(prefix), branch.start] == path
        assert all(run.start < run.stop <= branch.start for run in prefix)
        depth, length = len(path) - 1, branch.stop - branch.start
        assert tree.position[branch].tolist() == list(range(depth, depth + length))


@pytest.mark.parametrize("heads", [(4, 4, 4), (4, 2, 2), (4, 1, 1)])
@pytest.mark.parametrize("seed", range(4))
def test_output_and_gradients_are_those_under_the_dense_rule(seed, heads):
    tree = random_tree(seed, sequences=5, longest=40)
    u = len(tree.ids)
    q, k, v = inputs(u + 3, heads)
    given = torch.randn(1, 4, u, 8, generator=Generator().manual_seed(9), dtype=torch.float64)
    results = []
    for branchwise in (True, False):
        if branchwise:
            out = attend_by_branch(q, k, v, find_branches(tree.position), 0.3)
            assert not out[:, :, u:].any()
        else:
            wide = (t[:, :, :u].repeat_interleave(4 // heads[1], dim=1) for t in (k, v))
            out = scaled_dot_product_attention(q[:, :, :u], *wide, attn_mask=attention_mask(tree), scale=0.3)
        results.append([out[:, :, :u], *torch.autograd.grad((out[:, :, :u] * given).sum(), (q, k, v))])
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got, expected, atol=1e-12)
        assert not got[:, :, u:].any()


def test_gradcheck():
    branches = find_branches(random_tree(5, sequences=4, longest=6).position)
    u = branches[-1][0].stop
    assert any(prefix for _, prefix in branches)
    assert torch.autograd.gradcheck(
        lambda q, k, v: attend_by_branch(q, k, v, branches, None), inputs(u, (2, 2, 2), 4)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_little_more_than_one_kernel_under_a_mask(dtype):
    tree = random_tree(2)
    exact = inputs(len(tree.ids), (2, 2, 2), 16)
    results = []
    for inner in (torch.float64, dtype):
        q, k, v = (t.detach().to(inner).requires_grad_() for t in exact)
        for branchwise in (True, False):
            if branchwise:
                out = attend_by_branch(q, k, v, find_branches(tree.position), None)
            else:
                out = scaled_dot_product_attention(q, k, v, attn_mask=attention_mask(tree))
            results.append([out, *torch.autograd.grad(out.sum(), (q, k, v))])
    truth, _, ours, theirs = results
    for exactly, got, plain in zip(truth, ours, theirs, strict=True):
        errors = [(t.double() - exactly).norm() for t in (got, plain)]
        assert errors[0] < 2 * errors[1] and errors[1] < 0.05 * exactly.norm()


def test_derivatives_of_derivatives_are_refused():
    q, k, v = inputs(4, (1, 1, 1))
    out = attend_by_branch(q, k, v, ((slice(0, 4), ()),), None)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("longest, width, calls", [(3, 1024, 0), (300, 1024, 1), (300, 16, 0)])
def test_short_branches_and_narrow_heads_are_left_to_the_model(longest, width, calls, monkeypatch):
    layout = TreeLayout.from_tree(random_tree(0, longest=longest), TreeOptions(kernel="branches"))
    attend = Mock(wraps=attend_by_branch)
    monkeypatch.setattr(cpu_attention, "attend_by_branch", attend)
    q, k, v = (t.float() for t in inputs(layout.ids.numel(), (4, 4, 4), width // 4))
    attend_with_kernel(layout, q, k, v, None, None)
    assert attend.call_count == calls


@pytest.mark.parametrize("name", ["hf-llama", "xt-rotary-flash"])
def test_a_kernel_that_does_not_give_the_models_attention_is_not_used(name, monkeypatch):
    monkeypatch.setattr(cpu_attention, "MIN_BRANCH_NUMEL", 0)
    case = arguments(random_batch(Generator().manual_seed(0), b=4))
    right = DPO(ZOO[name](0))
    expected = right(**case)
    assert tree_kernels(right) == {"branches"}
    monkeypatch.setattr(cpu_attention, "attend_by_branch", lambda q, *_: torch.zeros_like(q))
    wrong = DPO(ZOO[name](0))
    assert torch.allclose(wrong(**case), expected) and tree_kernels(wrong) == {"model"}
    assert "along each path" in wrong.explain()


@given(st.integers(0, 1000))
@settings(max_examples=20)
def test_branches_run_through_the_rows_of_a_layout(seed):
    tree = random_tree(seed, longest=30)
    layout = TreeLayout.from_tree(tree, TreeOptions(16, "branches"))
    assert layout.branches == find_branches(tree.position)
