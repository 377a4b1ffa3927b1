"""A policy whose layers accelerate has put on two devices: on one GPU, half of them stay on the CPU."""

import pytest
import torch
from torch import Generator

from dpo_wrapper import DPO
from helpers.batches import random_batch
from helpers.dpo_calls import arguments, nudged
from helpers.models import hf_llama


def dispatch(model, device: str):
    """Embeddings and the first layer on `device`, the second layer and the head on the CPU; all train."""
    accelerate = pytest.importorskip("accelerate")
    names = ("model.embed_tokens", "model.rotary_emb", "model.layers.0")
    others = ("model.layers.1", "model.norm", "lm_head")
    device_map = dict.fromkeys(names, device) | dict.fromkeys(others, "cpu")
    # with another main device, what is on the CPU is copied to it layer by layer and cannot train
    return accelerate.dispatch_model(model, device_map, main_device="cpu", force_hooks=True)


def test_loss_and_gradients_are_those_of_one_device(device):
    device = "cuda:0" if device == "cuda" else device
    results = []
    for is_split in (False, True):
        policy, reference = nudged(hf_llama(0, hidden_size=32)), hf_llama(0, hidden_size=32)
        place = (lambda model: dispatch(model, device)) if is_split else (lambda model: model.to(device))
        columns = {
            name: tuple(t.to(device) for t in value) if isinstance(value, tuple) else value.to(device)
            for name, value in arguments(random_batch(Generator().manual_seed(0), b=4, odd=0)).items()
        }
        policy = place(policy)
        loss = DPO(policy, reference=place(reference))(**columns)
        loss.backward()
        results.append([loss.detach().cpu(), *(p.grad.cpu() for p in policy.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
