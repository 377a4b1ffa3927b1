"""The hooks in attention: they leave nothing behind; checkpointing, compiled parts and threads work."""

import functools
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from dpo_wrapper import DPO
from helpers.dpo_calls import arguments, nudged
from helpers.kernels import shares_prefix
from helpers.models import DEPTH, ZOO
from helpers.shareable_models import (
    CASES,
    SHAREABLE,
    assert_close,
    held_attributes,
    loss_and_gradients,
    make_dpo,
)


@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize("name", ["xt-alibi", "xt-window", "hf-llama", "hf-gpt2", "gemma2"])
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
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["hf-llama", "hf-gpt2", "gemma2", "mistral"])
def test_gradient_checkpointing(name, reentrant):
    dpo = make_dpo(SHAREABLE[name])
    model, ids = dpo.policy_model, CASES[1].preferred_seq
    expected, logits = loss_and_gradients(dpo, CASES[1]), model(input_ids=ids).logits
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    model.enable_input_require_grads()
    dpo(**arguments(CASES[1]))  # looks at the model again
    calls: list[int] = []
    for k, layer in enumerate(m for m in model.modules() if type(m).__name__.endswith("Attention")):
        layer.register_forward_pre_hook(lambda *_, k=k: calls.append(k))
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
@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize(
    "name, parts",
    [
        ("hf-llama", ["LlamaModel"]),
        ("hf-llama", ["LlamaDecoderLayer"]),
        ("hf-llama", ["LlamaMLP"]),
        ("xt-rotary-flash", ["AttentionLayers", "Decoder"]),
        ("xt-rotary-flash", ["FeedForward"]),
    ],
)
def test_compiled_parts(name, parts):
    expected = loss_and_gradients(make_dpo(ZOO[name]), CASES[1])
    torch._dynamo.reset()
    dpo = make_dpo(lambda seed: compile_parts(ZOO[name](seed), parts))
    assert any(m._compiled_call_impl is not None for m in dpo.policy_model.modules())
    assert_close(loss_and_gradients(dpo, CASES[1]), expected, 3e-5)
    assert shares_prefix(dpo)


@pytest.mark.slow
@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize("warm", [True, False], ids=["after-a-call", "from-the-first-call"])
@pytest.mark.parametrize("name", ["xt-rotary", "xt-alibi", "hf-llama"])
def test_two_threads(name, warm, request):
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
