"""Models whose layers carry a state: a step over the prefix tree against padded rows, on the device."""

import pytest
import torch
from torch import Tensor

from dpo_wrapper import DPO
from helpers.dpo_calls import arguments, on_device
from helpers.kernels import probes, shares_prefix
from helpers.shareable_models import CASES, RECURRENT, make_dpo


def train_step(dpo: DPO, device: str) -> tuple[Tensor, Tensor]:
    """The loss, and all gradients as one vector."""
    loss = dpo.to(device)(**on_device(arguments(CASES[1]), device))
    loss.backward()
    grads = [p.grad.flatten() for p in dpo.policy_model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(grads)


@pytest.mark.parametrize("name", ["qwen3.5", "mamba2", "mamba", "lfm2", "recurrent-gemma", "xt-shift"])
def test_a_step_over_the_tree_equals_that_of_padded_rows(name, device):
    make, told = RECURRENT[name]
    shared, padded = make_dpo(make), make_dpo(make, False)
    (loss, grads), (expected_loss, expected_grads) = (train_step(dpo, device) for dpo in (shared, padded))
    assert torch.allclose(loss, expected_loss, atol=1e-5)
    assert (grads - expected_grads).norm() < 1e-4 * expected_grads.norm()
    assert shares_prefix(shared) and all(probe.kernels & {"fork", "paths"} for probe in probes(shared))
    if device == "cpu":
        assert told in shared.explain()
