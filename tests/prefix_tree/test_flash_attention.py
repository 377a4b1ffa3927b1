"""FlashAttention over a tree, with torch's kernel replaced by what it computes, for there is none on the CPU.

`tests/gpu/test_tree_attention.py` tries the kernel itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor
from torch.nn.functional import scaled_dot_product_attention

from dpo_wrapper import DPO
from dpo_wrapper.prefix_tree import PrefixTree, TreeLayout, TreeOptions, flash_attention
from dpo_wrapper.prefix_tree.flash_attention import BranchSequences
from dpo_wrapper.scoring import probe
from helpers.batches import random_batch
from helpers.dpo_calls import arguments, nudged
from helpers.kernels import tree_kernels
from helpers.models import ZOO
from helpers.trees import attention_mask, branching_sequences, random_tree

OPTIONS = TreeOptions(kernel="flash")


def attend_sequences(
    q, k, v, query_bounds, key_bounds, max_queries, max_keys, dropout, is_causal, *, scale, **sides
) -> Tensor:
    """What the kernel computes: of each sequence the last query sees the last key."""
    assert dropout == 0 and {t.dtype for t in (query_bounds, key_bounds)} == {torch.int32}
    assert int(query_bounds[-1]) == len(q) and int(key_bounds[-1]) == len(k)
    assert is_causal == (sides["window_size_right"] == -1)  # without a window it stands for 0
    outputs = []
    for query_ends, key_ends in zip(query_bounds.unfold(0, 2, 1), key_bounds.unfold(0, 2, 1), strict=True):
        queries, keys = torch.arange(*query_ends), torch.arange(*key_ends)
        assert len(queries) <= max_queries and len(queries) <= len(keys) <= max_keys and max_queries > 1
        distance = torch.arange(len(queries))[:, None] + len(keys) - len(queries) - torch.arange(len(keys))
        left = sides["window_size_left"]
        mask = (distance >= 0) & (distance <= (left if left >= 0 else len(keys)))
        heads = (t.transpose(0, 1) for t in (q[queries], k[keys], v[keys]))
        wide = [t.repeat_interleave(q.shape[1] // t.shape[0], dim=0) for t in heads]
        outputs.append(scaled_dot_product_attention(*wide, attn_mask=mask, scale=scale).transpose(0, 1))
    return torch.cat(outputs)


@contextmanager
def replaced_kernel() -> Iterator[None]:
    def forward(q, k, v, *arguments, **options):
        *arguments, return_debug_mask = arguments
        assert return_debug_mask is False
        return (
            attend_sequences(q, k, v, *arguments, **options),
            torch.ones(1),
            torch.ones(2),
            torch.ones(3),
            None,
        )

    def backward(grad, q, k, v, out, lse, *arguments, **options):
        *arguments, state, unused = arguments
        assert [len(t) for t in (lse, state, unused)] == [1, 2, 3]
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            again = attend_sequences(*leaves, *arguments, **options)
            assert torch.equal(again, out)
            return torch.autograd.grad(again, leaves, grad)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
        patch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
        yield


def check(tree: PrefixTree, max_positions: int | None, window: int | None, kv_heads: int = 1) -> None:
    """Outputs and gradients are those of attention under a dense mask, in float64."""
    layout = TreeLayout.from_tree(tree, TreeOptions(max_positions, kernel="flash"))
    u, size = len(tree.ids), layout.ids.numel()
    generator = Generator().manual_seed(u)
    heads = [torch.randn(size, n, 8, generator=generator).double() for n in (2, kv_heads, kv_heads)]
    upstream = torch.randn(u, 2, 8, generator=generator).double()
    q, k, v = (t.clone().requires_grad_() for t in heads)
    with replaced_kernel():
        out = flash_attention.attend_with_flash(layout, q, k, v, window, 0.3)
        grads = torch.autograd.grad(out[:u], (q, k, v), upstream)

    mask = attention_mask(tree)
    if window is not None:
        mask &= tree.position[:, None] - tree.position < window
    dense = [t[:u].clone().requires_grad_() for t in heads]
    wide = (t.transpose(0, 1).repeat_interleave(2 // t.shape[1], dim=0) for t in dense)
    expected = scaled_dot_product_attention(*wide, attn_mask=mask, scale=0.3).transpose(0, 1)
    torch.testing.assert_close(out[:u], expected)
    for grad, exact in zip(grads, torch.autograd.grad(expected, dense, upstream), strict=True):
        torch.testing.assert_close(grad[:u], exact, rtol=1e-5, atol=1e-5)  # summed in float32
        assert not grad[u:].any()  # NaN would be true
    assert out.isfinite().all()


@given(branching_sequences().filter(any), st.sampled_from([None, 1, 3]), st.sampled_from([None, 20]))
def test_any_tree(sequences, window, max_positions):
    check(PrefixTree.from_sequences(sequences), max_positions, window)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_a_tree_in_several_rows(kv_heads):
    tree = random_tree(1, longest=30)
    assert len(tree.ids) % 4  # in four rows there is padding
    check(tree, 25, None, kv_heads)


def test_sequences_of_one_token_are_no_decoding_step():
    """With one query for each sequence the kernel would put heads in the place of queries."""
    layout = TreeLayout.from_tree(PrefixTree.from_sequences([[1], [2], [3]]), OPTIONS)
    assert BranchSequences.from_layout(layout).max_queries == 2


def heads(width: int = 64, dtype: torch.dtype = torch.bfloat16, is_cuda: bool = True) -> SimpleNamespace:
    return SimpleNamespace(shape=(9, 2, width), dtype=dtype, is_cuda=is_cuda, device="cuda")


@pytest.fixture
def on_ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))


@pytest.mark.parametrize(
    "q, v, fits",
    [
        (heads(), heads(), True),
        (heads(256, torch.float16), heads(256, torch.float16), True),
        (heads(is_cuda=False), heads(is_cuda=False), False),
        (heads(dtype=torch.float32), heads(dtype=torch.float32), False),
        (heads(), heads(dtype=torch.float16), False),
        (heads(512), heads(512), False),
        (heads(60), heads(60), False),
        (heads(192), heads(128), False),
    ],
)
def test_which_heads_the_kernel_takes(q, v, fits, on_ampere):
    assert flash_attention.fits_flash(q, q, v) == fits


def test_older_cards_and_what_the_user_switches_off(on_ampere, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    assert not flash_attention.fits_flash(heads(), heads(), heads())
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not flash_attention.fits_flash(heads(), heads(), heads())


@pytest.mark.parametrize("window", [None, 3])
def test_torchs_operators_take_these_arguments(window):
    """On a device without numbers torch checks the arguments, and gives results of the right shapes."""
    layout = TreeLayout.from_tree(random_tree(1), OPTIONS)
    layout.remember("branch sequences", lambda: BranchSequences.from_layout(layout).to("meta"))
    sizes = [(len(layout.subtree_end), n, 64) for n in (14, 2, 2)]
    q, k, v = (torch.empty(size, dtype=torch.bfloat16, device="meta", requires_grad=True) for size in sizes)
    out = flash_attention.attend_with_flash(layout, q, k, v, window, None)
    assert out.shape == q.shape and out.dtype == q.dtype
    for x, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert grad.shape == x.shape and grad.dtype == x.dtype


def run_step(share_prefix: bool = True) -> tuple[DPO, Tensor]:
    policy, reference = nudged(ZOO["hf-llama-gqa"](0)), ZOO["hf-llama-gqa"](0)
    dpo = DPO(policy, reference=reference, share_prefix=share_prefix)
    loss = dpo(**arguments(random_batch(Generator().manual_seed(0), b=4, odd=0)))
    loss.backward()
    return dpo, loss.detach()


def attend_wrongly(layout, q, k, v, window, scale):
    return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1) * 1.0


@pytest.mark.parametrize(
    "attend, reason",
    [(Mock(side_effect=RuntimeError("no kernel image")), "no kernel image"), (attend_wrongly, "differ")],
)
def test_the_next_kernel_is_tried_where_this_one_fails(attend, reason, monkeypatch):
    monkeypatch.setitem(probe.FAST_KERNELS, "cpu", ("flash", "branches"))
    monkeypatch.setattr(flash_attention, "fits_flash", lambda *_: True)
    monkeypatch.setattr(flash_attention, "attend_with_flash", attend)
    dpo, _ = run_step()
    assert tree_kernels(dpo) == {"branches"}
    monkeypatch.setitem(probe.FAST_KERNELS, "cpu", ("flash",))
    dpo, _ = run_step()
    assert tree_kernels(dpo) == {"model"}
    assert "FlashAttention does not fit (" in dpo.explain() and reason in dpo.explain()


@torch.no_grad()  # FlexAttention has no backward pass on the CPU
def test_flex_attention_is_next_where_no_head_fits(monkeypatch):
    monkeypatch.setitem(probe.FAST_KERNELS, "cpu", ("flash", "flex"))
    dpo = DPO(nudged(ZOO["hf-llama"](0)), reference=ZOO["hf-llama"](0), share_prefix=True)
    dpo(**arguments(random_batch(Generator().manual_seed(0), b=4, odd=0)))
    assert tree_kernels(dpo) == {"flex"} and "by FlexAttention;" in dpo.explain()


def test_the_explanation_names_what_has_run(monkeypatch):
    monkeypatch.setitem(probe.FAST_KERNELS, "cpu", ("flash",))
    monkeypatch.setattr(flash_attention, "fits_flash", lambda *_: True)
    with replaced_kernel():
        dpo, loss = run_step()
    assert tree_kernels(dpo) == {"flash"}
    assert "shared prefixes are computed once, by FlashAttention;" in dpo.explain()
    torch.testing.assert_close(loss, run_step(share_prefix=False)[1])
