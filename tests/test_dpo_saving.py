"""Saving a DPO, and two of them around one model."""

import io

import pytest
import torch

from dpo_wrapper import DPO
from helpers.dpo_calls import LN2, nudged
from helpers.models import ZOO
from helpers.naive_dpo import ARGUMENTS


@pytest.mark.parametrize("name", ["xt-tied", "xt-wrapped", "hf-llama-tied", "plain-tied"])
def test_a_state_dict_carries_policy_and_reference(name):
    dpo, fresh = DPO(ZOO[name](0)), DPO(ZOO[name](5))
    nudged(dpo.policy_model, 0.1)
    assert {key.split(".")[0] for key in dpo.state_dict()} == {"policy_model", "ref_model"}
    fresh.load_state_dict(dpo.state_dict())
    assert fresh(**ARGUMENTS) == dpo(**ARGUMENTS)


@pytest.mark.parametrize("name", ["xt-rotary", "hf-llama", "plain-transformer"])
def test_a_dpo_can_be_pickled(name):
    dpo = DPO(ZOO[name](0))
    nudged(dpo.policy_model, 0.1)
    expected = dpo(**ARGUMENTS)
    file = io.BytesIO()
    torch.save(dpo, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)(**ARGUMENTS) == expected


@pytest.mark.parametrize("name", ["xt-tied", "hf-llama"])
def test_two_around_one_model_have_their_own_references(name):
    policy = ZOO[name](0)
    first = DPO(policy)
    nudged(policy, 0.1)
    second = DPO(policy)
    assert abs(first(**ARGUMENTS).item() - LN2) > 1e-4
    assert abs(second(**ARGUMENTS).item() - LN2) < 1e-6
