"""Attention over a tree against a dense mask in float64: values and, on CUDA alone, gradients.

Each case of FlexAttention is compiled anew on CUDA, which takes seconds, so that there are few. On the CPU,
torch has no backward pass of FlexAttention, and no FlashAttention at all.
"""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dpo_wrapper.prefix_tree import TreeKernel, TreeOptions, flex_attention
from dpo_wrapper.prefix_tree.attention import attend_with_kernel
from dpo_wrapper.prefix_tree.layout import TreeLayout
from dpo_wrapper.prefix_tree.tree import PrefixTree
from helpers.log_prob_inputs import relative_error
from helpers.marks import mark_slow_except
from helpers.trees import attention_mask, random_tree

CASES = {  # width of a head, heads of q, heads of k and v, window, dtype
    "64-bfloat16-gqa": (64, 14, 2, None, torch.bfloat16),  # as in Qwen2.5-0.5B
    "128-bfloat16-gqa": (128, 12, 2, None, torch.bfloat16),  # as in Qwen2.5-1.5B
    "16-float32-gqa": (16, 4, 2, None, torch.float32),
    "64-bfloat16-window": (64, 4, 4, 50, torch.bfloat16),
    "128-float32-window-gqa": (128, 4, 2, 50, torch.float32),
    "16-bfloat16-window": (16, 2, 2, 50, torch.bfloat16),
}

FLEX = ["16-float32-gqa", "64-bfloat16-window", "128-float32-window-gqa"]


def draw(tree: PrefixTree, dim: int, heads: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output, on the CPU."""
    generator, u = Generator().manual_seed(1), len(tree.ids)
    shapes = [(1, n, u, dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def attend_densely(tree: PrefixTree, window: int | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = attention_mask(tree)
    if window is not None:
        mask &= tree.position[:, None] - tree.position < window
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.device))


def attend_by(
    kernel: TreeKernel, tree: PrefixTree, window: int | None, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    layout = TreeLayout.from_tree(tree, TreeOptions(kernel=kernel)).to(q.device)
    out = attend_with_kernel(layout, q, k, v, window, None)
    assert out is not None and layout.kernels == {kernel}
    return out


def values_and_grads(attend, tree, window, inputs, *, has_backward: bool) -> list[Tensor]:
    *qkv, upstream = inputs
    qkv = [x.detach().requires_grad_(has_backward) for x in qkv]
    out = attend(tree, window, *qkv)
    grads = torch.autograd.grad(out, qkv, upstream) if has_backward else ()
    return [out.detach(), *grads]


def check(kernel: TreeKernel, case: str, device: str, tree: PrefixTree) -> None:
    """The error of a kernel is about that of attention under a dense mask in the same dtype."""
    *sizes, window, dtype = CASES[case]
    inputs = [x.to(device) for x in draw(tree, *sizes, dtype)]
    options = {"has_backward": device == "cuda"}
    true = values_and_grads(attend_densely, tree, window, [x.double() for x in inputs], **options)
    plain = values_and_grads(attend_densely, tree, window, inputs, **options)
    results = values_and_grads(partial(attend_by, kernel), tree, window, inputs, **options)
    for name, got, same_dtype, exact in zip(("out", "q", "k", "v"), results, plain, true, strict=False):
        assert got.dtype == dtype
        error, plain_error = relative_error(got, exact), relative_error(same_dtype, exact)
        assert error < max(3 * plain_error, 1e-6), f"{name}: {error:.1e}, of a dense mask {plain_error:.1e}"


@pytest.mark.parametrize("case", mark_slow_except(FLEX[:2], FLEX))
def test_values_and_gradients(case, device):
    check("flex", case, device, random_tree(1))


@pytest.mark.cuda
@pytest.mark.parametrize("case", [case for case in CASES if "bfloat16" in case])
def test_flash_attention(case):
    for seed, longest in ((1, 200), (2, 3), (3, 400)):
        check("flash", case, "cuda", random_tree(seed, longest=longest))


@pytest.mark.cuda
def test_flash_attention_of_sequences_of_one_token():
    check("flash", "64-bfloat16-gqa", "cuda", PrefixTree.from_sequences([[1], [2], [3]]))


@torch.no_grad()
def test_trees_and_windows_of_any_size_share_a_graph(monkeypatch):
    """On CUDA each graph is compiled for seconds; a tree within one block of 128 tokens has its own."""
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    counted = torch.compile(flex_attention.flex_attention, dynamic=True, backend=count)
    monkeypatch.setattr(flex_attention, "flex_attention", counted)
    *sizes, _, dtype = CASES["16-float32-gqa"]
    trees = [(200, None, 1), (150, None, 1), (400, None, 1), (200, 50, 2), (300, 60, 2), (10, None, 3)]
    for seed, (longest, window, expected) in enumerate(trees):
        tree = random_tree(seed, longest=longest)
        assert (len(tree.ids) <= flex_attention.BLOCK_SIZE) == (longest == 10)
        attend_by("flex", tree, window, *draw(tree, *sizes, dtype)[:3])
        assert len(graphs) == expected, (len(tree.ids), window)


@pytest.mark.cuda
def test_another_tree_compiles_nothing():
    case = next(iter(CASES))
    check("flex", case, "cuda", random_tree(1))
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed, longest in ((2, 150), (3, 400)):
            check("flex", case, "cuda", random_tree(seed, longest=longest))
