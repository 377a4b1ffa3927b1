"""The hooks in attention: they leave nothing behind; checkpointing, compiled parts and threads work."""

import functools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from x_transformers import Decoder, TransformerWrapper

from dpo_wrapper import DPO
from dpo_wrapper.prefix_tree import cpu_attention
from helpers.dpo_calls import arguments, nudged
from helpers.kernels import shares_prefix, tree_kernels
from helpers.marks import mark_slow_except
from helpers.models import CONTEXT, DEPTH, DIM, VOCAB, ZOO, randomise_, seeded
from helpers.oracle import ExactFloat64
from helpers.shareable_models import (
    CASES,
    SHAREABLE,
    assert_close,
    batch_with_shared_prefixes,
    held_attributes,
    loss_and_gradients,
    make_dpo,
)


@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize(
    "name",
    mark_slow_except(["xt-window", "hf-llama"], ["xt-alibi", "xt-window", "hf-llama", "hf-gpt2", "gemma2"]),
)
def test_nothing_is_left_behind(name):
    dpo, should_fail = make_dpo(SHAREABLE[name]), False
    last = [m for m in dpo.policy_model.modules() if "attention" in type(m).__name__.lower()][-1]
    last.register_forward_hook(lambda *_: 1 / 0 if should_fail else None)
    before, expected = held_attributes(dpo), loss_and_gradients(dpo, CASES[1])
    assert held_attributes(dpo) == before
    should_fail = True
    with pytest.raises(ZeroDivisionError):
        dpo(**arguments(CASES[1]))
    assert held_attributes(dpo) == before
    should_fail = False
    assert_close(loss_and_gradients(dpo, CASES[1]), expected, 0)


@pytest.mark.pitfall(24)
@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize(
    "name, reentrant",
    mark_slow_except(
        [("hf-llama", False), ("gemma2", True)],
        product(["hf-llama", "hf-gpt2", "gemma2", "mistral"], [False, True]),
    ),
)
def test_gradient_checkpointing(name, reentrant):
    dpo = make_dpo(SHAREABLE[name])
    model, ids = dpo.policy_model, CASES[1].preferred_seq
    expected, logits = loss_and_gradients(dpo, CASES[1]), model(input_ids=ids).logits
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    model.enable_input_require_grads()
    calls: list[int] = []
    for k, layer in enumerate(m for m in model.modules() if type(m).__name__.endswith("Attention")):
        layer.register_forward_pre_hook(lambda *_, k=k: calls.append(k))
    dpo(**arguments(CASES[1]))  # looks at the model again
    calls.clear()
    loss = dpo(**arguments(CASES[1]))
    assert sorted(calls) == list(range(DEPTH))
    loss.backward()
    assert sorted(calls) == sorted([*range(DEPTH)] * 2)  # the layers ran again
    for k, p in enumerate(model.parameters()):
        assert torch.allclose(p.grad, expected[f"gradient {k}"], atol=1e-6)
    assert torch.equal(model(input_ids=ids).logits, logits)
    model.gradient_checkpointing_disable()
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert "dpo_wrapper" not in model.config.to_json_string()


@pytest.mark.pitfall(24)
@pytest.mark.parametrize("name", ["hf-llama", "xt-rotary"])
def test_layers_wrapped_for_checkpointing(name):
    expected = loss_and_gradients(make_dpo(ZOO[name]), CASES[1])
    policy = nudged(ZOO[name](0), 0.05)
    layers = ("LlamaDecoderLayer", "Attention")
    apply_activation_checkpointing(policy, check_fn=lambda m: type(m).__name__ in layers)
    dpo = DPO(policy, reference=ZOO[name](0), beta=0.3)
    assert_close(loss_and_gradients(dpo, CASES[1]), expected, 3e-5)
    assert shares_prefix(dpo)


def compile_parts(model, parts):
    for module in model.modules():
        if type(module).__name__ in parts:
            module.compile(backend="eager")
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, parts, each_kernel",
    [
        ("hf-llama", ["LlamaModel"], "branches"),
        ("hf-llama", ["LlamaDecoderLayer"], "model"),
        ("hf-llama", ["LlamaMLP"], "branches"),
        ("xt-rotary-flash", ["AttentionLayers", "Decoder"], "branches"),
        ("xt-rotary-flash", ["FeedForward"], "model"),
        ("xt-gru", ["FoldAxially"], "model"),
    ],
    indirect=["each_kernel"],
)
@pytest.mark.usefixtures("one_layer")
def test_compiled_parts(name, parts, each_kernel):
    expected, make = loss_and_gradients(make_dpo(SHAREABLE[name]), CASES[1]), SHAREABLE[name]
    torch._dynamo.reset()
    dpo = make_dpo(lambda seed: compile_parts(make(seed), parts), make_reference=make)
    assert any(m._compiled_call_impl is not None for m in dpo.policy_model.modules())
    assert_close(loss_and_gradients(dpo, CASES[1]), expected, 3e-5)
    assert shares_prefix(dpo)


@pytest.mark.slow
@pytest.mark.usefixtures("one_layer")
@pytest.mark.parametrize("name", ["hf-llama", "xt-rotary-flash"])
def test_a_model_compiled_and_used_before_is_compiled_no_more_for_new_trees(name):
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def count_graph(graph: torch.fx.GraphModule, _inputs: object) -> Callable:
        graphs.append(graph)
        return graph.forward

    dpo, plain = (make_dpo(SHAREABLE[name]) for _ in range(2))
    model = dpo.policy_model
    (model.attn_layers if name.startswith("xt") else model.base_model).compile(backend=count_graph)
    model(CASES[0].preferred_seq)
    dpo = DPO(model, reference=dpo.ref_model, beta=0.3)
    counts = []
    for k in range(5):
        case = batch_with_shared_prefixes(b=3 + k, n=12 + k)
        assert_close(loss_and_gradients(dpo, case), loss_and_gradients(plain, case), 3e-5)
        counts.append(len(graphs))
    assert counts[-1] == counts[0] > 0 and shares_prefix(dpo)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_kernels_group_heads_as_x_transformers_does(kv_heads, monkeypatch):
    """Head i of 4 attends with head i % 2 of the keys, where other libraries take i // 2."""
    monkeypatch.setattr(cpu_attention, "MIN_BRANCH_NUMEL", 0)

    def make(seed: int) -> nn.Module:
        with seeded(seed):
            options = dict(attn_kv_heads=kv_heads, attn_flash=True, attn_dim_head=8, rotary_pos_emb=True)
            layers = Decoder(dim=DIM, depth=DEPTH, heads=4, verbose=False, **options)
            model = TransformerWrapper(num_tokens=VOCAB, max_seq_len=CONTEXT, attn_layers=layers)
            return randomise_(model, embed_std=1.0)

    shared, padded = (make_dpo(make, share, exact=True) for share in (True, False))
    with ExactFloat64():
        results, expected = loss_and_gradients(shared, CASES[1]), loss_and_gradients(padded, CASES[1])
    assert tree_kernels(shared) == {"branches"}
    assert_close(results, expected, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("warm", [True, False], ids=["after-a-call", "from-the-first-call"])
@pytest.mark.parametrize(
    "name, each_kernel",
    [
        *product(["xt-rotary", "xt-alibi"], ["model"]),  # which never take the other kernel
        *product(["hf-llama", "qwen3.5", "minimax"], ["model", "branches"]),
    ],
    indirect=["each_kernel"],
)
def test_two_threads(name, each_kernel, warm, request):
    request.addfinalizer(functools.partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)
    expected = [loss_and_gradients(make_dpo(SHAREABLE[name]), case) for case in CASES[1:]]
    for _ in range(3):
        dpo = make_dpo(SHAREABLE[name])
        if warm:
            dpo(**arguments(CASES[0]))
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(functools.partial(loss_and_gradients, dpo), CASES[1:]))
        assert shares_prefix(dpo)
        for result, alone in zip(results, expected, strict=True):
            assert_close(result, alone, 3e-5)
