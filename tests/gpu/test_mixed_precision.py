"""A step under autocast, and in float16 with a GradScaler: gradients against float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from dpo_wrapper import DPO
from helpers.batches import random_batch
from helpers.dpo_calls import arguments, nudged, on_device
from helpers.kernels import tree_kernels
from helpers.models import ZOO, hf_llama
from helpers.oracle import ExactFloat64

MODELS: dict[str, Callable[[int], nn.Module]] = {
    "llama": lambda seed: hf_llama(seed, hidden_size=32),  # heads of 16, as FlexAttention needs on CUDA
    "gru": ZOO["plain-gru"],  # padded, and without a head of its own
}
CASE = arguments(random_batch(Generator().manual_seed(0), b=4, odd=0))


def make_dpo(name: str, device: str, dtype: torch.dtype = torch.float32, **options: Any) -> DPO:
    policy, reference = nudged(MODELS[name](0)), MODELS[name](0)
    return DPO(policy.to(device, dtype), reference=reference.to(device, dtype), **options)


def grads_of(dpo: DPO) -> list[Tensor]:
    return [p.grad.detach().cpu().double() for p in dpo.policy_model.parameters()]


def true_grads(name: str) -> list[Tensor]:
    dpo = make_dpo(name, "cpu", torch.float64, share_prefix=False, log_prob_impl="eager")
    with ExactFloat64():
        dpo(**CASE).backward()
    return grads_of(dpo)


def error_of(grads: list[Tensor], true: list[Tensor]) -> float:
    difference = sum(float((a - b).square().sum()) for a, b in zip(grads, true, strict=True))
    return (difference / sum(float(b.square().sum()) for b in true)) ** 0.5


def train_step(
    dpo: DPO, device: str, dtype: torch.dtype, scaler: torch.amp.GradScaler | None = None
) -> list[Tensor]:
    with torch.autocast(device, dtype):
        loss = dpo(**on_device(CASE, device))
    assert loss.dtype == torch.float32
    if scaler is None:
        loss.backward()
        return grads_of(dpo)
    optimizer = torch.optim.SGD(dpo.policy_model.parameters(), lr=1e-2)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grads = grads_of(dpo)
    before = [p.detach().clone() for p in dpo.policy_model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert any(not torch.equal(*pair) for pair in zip(before, dpo.policy_model.parameters(), strict=True))
    return grads


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_gradients_under_autocast(name, dtype, device):
    if device == "cpu" and dtype == torch.float16 and name == "gru":
        pytest.skip("torch has no float16 GRU on the CPU")
    true = true_grads(name)
    scaler = None if dtype == torch.bfloat16 else torch.amp.GradScaler(device, init_scale=2.0**10)
    plain = make_dpo(name, device, share_prefix=False, log_prob_impl="eager")
    plain_error = error_of(train_step(plain, device, dtype), true)
    dpo = make_dpo(name, device)
    error = error_of(train_step(dpo, device, dtype, scaler), true)
    if device == "cuda" and name == "llama":
        assert tree_kernels(dpo) == {"flash"}
    assert error < max(3 * plain_error, 1e-4)
    if scaler is not None:
        assert scaler.get_scale() == 2.0**10, "no step was left out"


def test_an_overflow_leaves_the_step_out(device):
    dpo = make_dpo("llama", device)
    before = [p.detach().clone() for p in dpo.policy_model.parameters()]
    optimizer = torch.optim.SGD(dpo.policy_model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler(device, init_scale=1e38)
    with torch.autocast(device, torch.float16):
        loss = dpo(**on_device(CASE, device))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 1e38
    assert all(torch.equal(*pair) for pair in zip(before, dpo.policy_model.parameters(), strict=True))
