"""Activation checkpointing of every kind: the gradients of layers that run again are those without it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

from dpo_wrapper import DPO
from dpo_wrapper.prefix_tree import cpu_attention
from helpers.dpo_calls import arguments, nudged
from helpers.kernels import shares_prefix
from helpers.marks import mark_slow_except
from helpers.models import ZOO
from helpers.oracle import to_float64
from helpers.shareable_models import CASES, SHAREABLE

LAYERS = (
    "LlamaDecoderLayer",
    "GPT2Block",
    "OPTDecoderLayer",
    "Attention",
    "FeedForward",
    "TransformerEncoderLayer",
    "Qwen3_5DecoderLayer",
    "Mamba2Block",
    "RecurrentGemmaDecoderLayer",
)


def find_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ in LAYERS]


def count_runs(model: nn.Module) -> list[int]:
    """A list that grows when a layer runs."""
    runs: list[int] = []
    for k, layer in enumerate(find_layers(model)):
        linear = next(m for m in layer.modules() if type(m).__name__ in ("Linear", "Conv1D"))
        linear.register_forward_hook(lambda *_, k=k: runs.append(k))
    return runs


def by_the_librarys_flag(model: nn.Module, reentrant: bool) -> None:
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})


def by_torchs_wrapper(model: nn.Module, reentrant: bool) -> None:
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    wrap = partial(checkpoint_wrapper, checkpoint_impl=kind)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=wrap, check_fn=lambda module: type(module).__name__ in LAYERS
    )


def by_composition(model: nn.Module, reentrant: bool) -> None:
    assert not reentrant
    for layer in find_layers(model):
        composable_checkpoint(layer)


def by_hand(model: nn.Module, reentrant: bool) -> None:
    """As training loops do that call the layers themselves: tensors by position, the rest by name."""
    for layer in find_layers(model):

        def forward(*args: Any, own: Callable[..., Any] = layer.forward, **kwargs: Any) -> Any:
            return checkpoint(partial(own, **kwargs), *args, use_reentrant=reentrant)

        layer.forward = forward


def by_hand_twice(model: nn.Module, reentrant: bool) -> None:
    by_hand(model, reentrant)
    by_hand(model, reentrant)


WAYS = [
    (by_the_librarys_flag, True), (by_the_librarys_flag, False), (by_torchs_wrapper, True),
    (by_torchs_wrapper, False), (by_composition, False), (by_hand, True), (by_hand, False),
    (by_hand_twice, True), (by_hand_twice, False),
]  # fmt: skip
NAMES = [
    "hf-llama",
    "hf-gpt2",
    "hf-opt",
    "xt-rotary",
    "xt-alibi",
    "xt-window",
    "xt-t5",
    "xt-dropout",
    "xt-shift",
    "xt-gru",
    "qwen3.5",
    "mamba2",
    "recurrent-gemma",
    "plain-transformer",
]
TWICE = ("hf-llama", "xt-rotary", "qwen3.5", "recurrent-gemma", "plain-transformer")
"""Models of each kind of layer that runs again: checkpointing twice tells no more of the others."""
CASES_OF_WAYS = [
    (name, way, reentrant)
    for name in NAMES
    for way, reentrant in WAYS
    if way is not by_the_librarys_flag or not name.startswith(("xt", "plain"))
    if way is not by_hand_twice or name in TWICE
]
FAST = [
    *(("hf-llama", way, reentrant) for way, reentrant in WAYS if way is not by_hand_twice),
    ("xt-rotary", by_composition, False),
    ("xt-dropout", by_torchs_wrapper, False),
    ("qwen3.5", by_the_librarys_flag, True),
    ("plain-transformer", by_torchs_wrapper, True),
    ("plain-transformer", by_hand_twice, False),
]
"""Every way, and every kind of model."""


def make(name: str) -> DPO:
    """A policy in train mode, with dropout where the model has it, and a reference."""
    policy, reference = (to_float64(SHAREABLE.get(name, ZOO.get(name))(0)) for _ in range(2))
    for module in (*policy.modules(), *reference.modules()):
        if hasattr(module, "attn_fn"):  # of x-transformers, which rounds to float32
            module.attn_fn = partial(torch.softmax, dim=-1)
    return DPO(nudged(policy, 0.05), reference=reference, beta=0.3)


def backward(dpo: DPO) -> dict[str, Tensor | None]:
    """The loss of a batch, and the gradients that a step finds."""
    dpo.zero_grad()
    loss = dpo(**arguments(CASES[1]))
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in dpo.policy_model.named_parameters()}


def assert_equal(results: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """That they agree to rounding; a wrapper may have given the parameters other names."""
    for key, (value, truth) in zip(
        expected, zip(results.values(), expected.values(), strict=True), strict=True
    ):
        assert (value is None) == (truth is None), key
        assert truth is None or torch.allclose(value, truth, atol=1e-10, rtol=1e-10), key


@pytest.fixture(autouse=True)
def each_branch_by_the_kernel(monkeypatch):
    monkeypatch.setattr(cpu_attention, "MIN_BRANCH_NUMEL", 0)


@pytest.mark.pitfall(24)
@pytest.mark.parametrize("name, way, reentrant", mark_slow_except(FAST, CASES_OF_WAYS))
def test_gradients_are_those_without_checkpointing(name, way, reentrant):
    dpo = make(name)
    policy = dpo.policy_model.train()
    expected = backward(dpo)  # the model is checkpointed after its first call, and a new `DPO` is made of it
    way(policy, reentrant)
    modes = [module.training for module in policy.modules()]
    runs, layers = count_runs(policy), len(find_layers(policy))
    for each in (dpo, DPO(policy, reference=dpo.ref_model, beta=0.3)):
        for _ in range(2):
            runs.clear()
            assert_equal(backward(each), expected)
            assert sorted(set(runs)) == list(range(layers)) and len(runs) >= 2 * layers  # all ran again
            assert [module.training for module in policy.modules()] == modes
        assert shares_prefix(each) == (name != "plain-transformer"), each.explain()
