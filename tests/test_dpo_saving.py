"""Saving a DPO, and two of them around one model."""

import io

import pytest
import torch

from dpo_wrapper import DPO
from helpers.adapters import lora
from helpers.dpo_calls import LN2, nudged
from helpers.models import ZOO
from helpers.naive_dpo import ARGUMENTS, train


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


@pytest.mark.parametrize("name", ["hf-llama-tied", "xt-tied", "hf-llama-lora"])
def test_safetensors_saves_tied_and_shared_weights_once(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    make = (lambda seed: lora(ZOO["hf-llama"](0))) if name == "hf-llama-lora" else ZOO[name]
    dpo, fresh = DPO(make(0), reference="copy"), DPO(make(5), reference="copy")
    train(dpo)
    safetensors.save_model(dpo, str(tmp_path / "dpo.safetensors"))
    safetensors.load_model(fresh, str(tmp_path / "dpo.safetensors"))
    assert torch.equal(fresh(**ARGUMENTS), dpo(**ARGUMENTS))
