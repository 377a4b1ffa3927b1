"""What both kernels of attention over a tree do: several rows, grouped heads, autocast, many models."""

from functools import partial

import pytest
import torch
from torch import Generator
from torch.nn.functional import scaled_dot_product_attention

from dpo_wrapper.prefix_tree import TreeKernel, TreeLayout, TreeOptions, attend_with_kernel, flex_attention
from helpers.trees import attention_mask, random_tree

KERNELS: list[TreeKernel] = ["branches", "flex"]


def make_layout(kernel: TreeKernel, max_positions: int | None = None) -> tuple[TreeLayout, torch.Tensor]:
    """A layout of a random tree, and which of its tokens attend to which."""
    tree = random_tree(1, longest=30)
    options = TreeOptions(max_positions, kernel=kernel, min_branch_numel=0)
    return TreeLayout.from_tree(tree, options), attention_mask(tree)


def make_heads(layout: TreeLayout, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rows, width = layout.ids.shape
    return torch.randn(rows, count, width, 16, generator=Generator().manual_seed(count)).to(dtype)


@pytest.mark.parametrize("kernel, window", [("branches", None), ("flex", None), ("flex", 3)])
def test_trees_in_several_rows(kernel, window):
    layout, mask = make_layout(kernel, max_positions=30)
    assert len(layout.ids) > 2
    u = len(mask)
    if window is not None:
        position = layout.position.flatten()[:u]
        mask = mask & (position[:, None] - position < window)
    q, k, v = make_heads(layout, 4), make_heads(layout, 2), make_heads(layout, 2) + 1
    with torch.no_grad():
        out = attend_with_kernel(layout, q, k, v, window, 0.3)
    assert out is not None and out.shape == q.shape
    flat_q, flat_k, flat_v, flat_out = (t.transpose(0, 1).flatten(1, 2)[:, :u] for t in (q, k, v, out))
    wide = (t.repeat_interleave(2, dim=0) for t in (flat_k, flat_v))
    expected = scaled_dot_product_attention(flat_q, *wide, attn_mask=mask, scale=0.3)
    assert torch.allclose(flat_out, expected, atol=1e-5) and out.isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_casts_as_torchs_own_attention_does(kernel):
    """Norms with float32 weights make q and k float32 beside a v in bfloat16."""
    layout, _ = make_layout(kernel)
    q, k, v = make_heads(layout, 2), make_heads(layout, 2), make_heads(layout, 2, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = attend_with_kernel(layout, q, k, v, None, None)
        own = scaled_dot_product_attention(q, k, v)
        narrow = attend_with_kernel(layout, q.bfloat16(), k.bfloat16(), v, None, None)
    assert out.dtype == own.dtype == torch.bfloat16
    assert torch.equal(out, narrow)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        exact = attend_with_kernel(layout, q.double(), k.double(), v.double(), None, None)
    assert exact.dtype == torch.float64


@torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True)
def test_each_key_has_its_own_compiled_function(monkeypatch):
    """torch compiles one function at most `recompile_limit` times in a process."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    flex_attention.compile_flex_attention.cache_clear()
    layout, mask = make_layout("flex")
    distance = layout.position[0][:, None] - layout.position[0]
    for window in (None, 3, None):
        for dtype in (torch.float32, torch.float64):
            heads = [make_heads(layout, 2, dtype)] * 3
            compiled = flex_attention.compile_flex_attention(window, dtype)
            with torch.no_grad():
                out = compiled(*heads, layout.block_mask(window), None)
            in_window = mask & (distance < (window or 99))
            expected = scaled_dot_product_attention(*heads, attn_mask=in_window)
            assert torch.allclose(out, expected, atol=1e-5)
    assert flex_attention.compile_flex_attention.cache_info().currsize == 4
    flex_attention.compile_flex_attention.cache_clear()
