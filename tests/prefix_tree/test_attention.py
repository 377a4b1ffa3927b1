"""Attention along paths, against attention under the tree's mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator
from torch.nn.functional import scaled_dot_product_attention

from dpo_wrapper.prefix_tree import PrefixSharingError, TreeLayout, TreeOptions, attend_along_paths
from dpo_wrapper.prefix_tree.attention import make_causal_mask
from helpers.trees import attention_mask, random_tree


def random_heads(layout: TreeLayout, heads: int = 2, width: int = 4) -> list[torch.Tensor]:
    rows, columns = layout.ids.shape
    generator = Generator().manual_seed(0)
    shape = (rows, heads, columns, width)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def attend_causally(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


@given(st.integers(0, 1000), st.none() | st.integers(1, 40))
@settings(max_examples=40)
def test_outputs_are_those_under_the_mask_of_the_tree(seed, max_positions):
    tree = random_tree(seed, longest=30)
    layout, u = TreeLayout.from_tree(tree, TreeOptions(max_positions)), len(tree.ids)
    q, k, v = random_heads(layout)
    out = attend_along_paths(layout, q, k, v, attend_causally)
    assert out.shape == q.shape
    flat = [t.transpose(0, 1).flatten(1, 2)[:, :u] for t in (q, k, v, out)]  # [h u d]
    expected = scaled_dot_product_attention(*flat[:3], attn_mask=attention_mask(tree))
    assert torch.allclose(flat[3], expected, atol=1e-12)


def test_heads_of_other_tokens_are_refused():
    layout = TreeLayout.from_tree(random_tree(0, longest=30), TreeOptions())
    q, k, v = (torch.cat([t, t], dim=2) for t in random_heads(layout))
    with pytest.raises(PrefixSharingError, match="its attention has rows of shape"):
        attend_along_paths(layout, q, k, v, attend_causally)


@pytest.mark.parametrize("n, window", [(1, None), (4, None), (4, 1), (4, 2), (4, 9)])
def test_a_causal_mask_is_a_band(n, window):
    mask = make_causal_mask(n, window, torch.device("cpu"))
    expected = [[i - (window or n) < j <= i for j in range(n)] for i in range(n)]
    assert mask.tolist() == [[expected]]
