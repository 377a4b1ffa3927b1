"""FlexAttention over a tree: its block mask and forward pass on the CPU, its gradients on CUDA."""

from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

from dpo_wrapper import DPO
from dpo_wrapper.prefix_tree import flex_attention
from dpo_wrapper.prefix_tree.flex_attention import BLOCK_SIZE, attend_with_flex, create_tree_block_mask
from dpo_wrapper.scoring import probe
from helpers import models
from helpers.batches import random_batch
from helpers.dpo_calls import arguments, nudged
from helpers.kernels import probes, tree_kernels, use_kernel
from helpers.marks import mark_slow_except
from helpers.models import ZOO, x_transformer
from helpers.trees import attention_mask, random_tree


@given(st.integers(0, 10_000), st.integers(1, 8), st.sampled_from([3, 40, 200, 500]))
@settings(max_examples=40)
def test_blocks_hold_every_pair_that_attends_and_full_blocks_no_other(seed, sequences, longest):
    tree = random_tree(seed, sequences, longest)
    mask, attends = create_tree_block_mask(tree.subtree_end, tree.position), attention_mask(tree)
    u, count = len(tree.ids), -(-len(tree.ids) // BLOCK_SIZE)
    partial, full = (torch.zeros(count, count, dtype=torch.bool) for _ in range(2))
    for table, numbers, indices in (
        (partial, mask.kv_num_blocks, mask.kv_indices),
        (full, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for row, (number, index) in enumerate(zip(numbers[0, 0], indices[0, 0], strict=True)):
            table[row, index[:number].long()] = True
    assert not (partial & full).any()
    for i in range(count):
        for j in range(count):
            block = attends[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE, j * BLOCK_SIZE : (j + 1) * BLOCK_SIZE]
            assert (partial[i, j] or full[i, j]) == block.any(), (
                "computed where and only where something attends"
            )
            if full[i, j]:
                assert block.all() and block.shape == (min(BLOCK_SIZE, u - i * BLOCK_SIZE), BLOCK_SIZE)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_forward_equals_attention_under_the_dense_rule(heads, window):
    tree = random_tree(1)
    u = len(tree.ids)
    q, k, v = (
        torch.randn(1, n, u, 16, generator=Generator().manual_seed(n)) for n in (4, heads[1], heads[1])
    )
    out = attend_with_flex(q, k, v, create_tree_block_mask(tree.subtree_end, tree.position, window), 0.3)
    rule = attention_mask(tree)
    if window is not None:
        rule &= tree.position[:, None] - tree.position < window
    wide = (t.repeat_interleave(4 // heads[1], dim=1) for t in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, *wide, attn_mask=rule, scale=0.3)
    assert torch.allclose(out, expected, atol=1e-5)


MODELS = {
    "llama": lambda: ZOO["hf-llama"](0),
    "gqa": lambda: ZOO["hf-llama-gqa"](0),
    "gpt2": lambda: ZOO["hf-gpt2"](0),
    "flash": lambda: ZOO["xt-rotary-flash"](0),
    "window": lambda: x_transformer(
        0,
        decoder={"attn_flash": True, "attn_max_attend_past": 3, "rotary_pos_emb": True},
        use_abs_pos_emb=False,
    ),
    "not plain": lambda: ZOO["xt-alibi"](0),
}


FAST = ["gqa", "window", "not plain"]


@pytest.mark.parametrize("name", mark_slow_except(FAST, MODELS))
def test_log_probs_of_whole_models(name, monkeypatch):
    attend = Mock(wraps=attend_with_flex)
    monkeypatch.setattr(flex_attention, "attend_with_flex", attend)
    case = random_batch(Generator().manual_seed(0), b=4, odd=0)
    dpo = DPO(nudged(MODELS[name]()), reference=MODELS[name](), share_prefix=True)
    with torch.no_grad():
        expected = dpo(**arguments(case), return_metrics=True)[1]
        assert not attend.called
        use_kernel(dpo, "flex")
        got = dpo(**arguments(case), return_metrics=True)[1]
    assert attend.called == (name != "not plain")
    for metric in expected:
        assert torch.allclose(got[metric], expected[metric], atol=1e-4), metric


@pytest.mark.parametrize("name", mark_slow_except(FAST, MODELS))
def test_the_probe_keeps_to_the_models_attention_where_flex_fails(name, monkeypatch):
    monkeypatch.setitem(probe.FAST_KERNELS, "cpu", ("flex",))
    attend = Mock(side_effect=NotImplementedError)
    monkeypatch.setattr(flex_attention, "attend_with_flex", attend)
    case = random_batch(Generator().manual_seed(0), b=4, odd=0)
    dpo = DPO(nudged(MODELS[name]()), reference=MODELS[name](), share_prefix=True)
    dpo(**arguments(case)).backward()
    assert attend.called == (name != "not plain")
    assert tree_kernels(dpo) == {"model"}
    reason = (
        "FlexAttention does not fit (NotImplementedError" if attend.called else "not plain softmax attention"
    )
    assert reason in dpo.policy.explain()


@pytest.mark.cuda
@pytest.mark.parametrize("name", FAST)  # each is compiled for 20 s
def test_gradients_on_cuda(name, monkeypatch):
    monkeypatch.setattr(models, "DIM", 32)  # on CUDA, FlexAttention needs heads of 16 or more
    case = arguments(random_batch(Generator().manual_seed(0), b=4, odd=0))
    on_cuda = {k: tuple(t.cuda() for t in v) if isinstance(v, tuple) else v.cuda() for k, v in case.items()}
    grads = []
    for share in (True, False):
        policy = nudged(MODELS[name]()).cuda()
        dpo = DPO(policy, reference=MODELS[name]().cuda(), share_prefix=share)
        dpo(**on_cuda).backward()
        ran = "model" if name == "not plain" else "flex"  # FlashAttention takes no float32
        assert all(probe.kernels == ({ran} if share else set()) for probe in probes(dpo))
        grads.append([p.grad for p in policy.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
