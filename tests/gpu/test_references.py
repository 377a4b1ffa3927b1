"""The kinds of reference on a device: where they start, and that they stay there while the policy trains."""

import math

import pytest
import torch
from torch import Generator

from dpo_wrapper import DPO
from helpers.adapters import lora
from helpers.batches import random_batch
from helpers.dpo_calls import arguments, nudged, on_device
from helpers.models import hf_llama

WIDE = {"hidden_size": 32}  # heads of 16, the least that FlexAttention takes on CUDA
CASE = arguments(random_batch(Generator().manual_seed(0), b=4, odd=0))


def other_device(device: str) -> str:
    """Where a reference may stay that is not beside its policy."""
    if device == "cpu":
        return "cpu"
    return "cuda:1" if torch.cuda.device_count() > 1 else "cpu"


KINDS = {
    "copy": lambda device: DPO(hf_llama(0, **WIDE)).to(device),
    "copy in bfloat16": lambda device: DPO(hf_llama(0, **WIDE), reference_dtype=torch.bfloat16).to(device),
    "adapter": lambda device: DPO(lora(hf_llama(0, **WIDE)), reference="adapter").to(device),
    "another device": lambda device: DPO(
        hf_llama(0, **WIDE), reference="copy", reference_device=other_device(device)
    ).to(device),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_stays_where_it_starts(kind, device):
    dpo, columns = KINDS[kind](device), on_device(CASE, device)
    loss, before = dpo(**columns, return_metrics=True)
    assert loss.device.type == device
    assert abs(loss.item() - math.log(2)) < (1e-2 if kind == "copy in bfloat16" else 1e-4)

    optimizer = torch.optim.AdamW([p for p in dpo.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        dpo(**columns).backward()
        optimizer.step()
        optimizer.zero_grad()
    after_loss, after = dpo(**columns, return_metrics=True)
    for side in ("chosen", "rejected"):
        # on CUDA, sums over tokens are rounded in any order
        torch.testing.assert_close(after[f"logps/ref_{side}"], before[f"logps/ref_{side}"], rtol=1e-6, atol=0)
        assert not torch.equal(after[f"logps/{side}"], before[f"logps/{side}"])
    assert after_loss < loss


@pytest.mark.cuda
def test_log_probs_and_gradients_are_those_of_the_cpu():
    losses, grads = [], []
    for device in ("cpu", "cuda"):
        policy = nudged(hf_llama(0, **WIDE)).to(device)
        loss = DPO(policy, reference=hf_llama(0, **WIDE).to(device), share_prefix=True)(
            **on_device(CASE, device)
        )
        loss.backward()
        losses.append(loss.detach().cpu())
        grads.append([p.grad.cpu() for p in policy.parameters()])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
