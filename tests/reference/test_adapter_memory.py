"""The reference of a policy with an adapter costs no second copy of the weights that the adapter leaves."""

import pytest
import torch
from torch import Generator, nn

from dpo_wrapper import DPO
from helpers.batches import random_batch
from helpers.dpo_calls import arguments, nudged
from helpers.models import hf_llama

peft = pytest.importorskip("peft")

INITIALIZATIONS = {
    "default": {},
    "gaussian": dict(init_lora_weights="gaussian"),
    "pissa": dict(init_lora_weights="pissa"),
    "olora": dict(init_lora_weights="olora"),
    "dora": dict(use_dora=True),
    "rslora": dict(use_rslora=True),
    "head": dict(modules_to_save=["lm_head"]),
}


def adapt(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **INITIALIZATIONS[name])
    return peft.get_peft_model(hf_llama(0), config)


def storages(*tensors: torch.Tensor) -> dict[int, int]:
    """The bytes of each distinct storage."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def extra_bytes(dpo: DPO) -> int:
    """The bytes of the parameters of policy and reference beyond those of the policy."""
    policy = storages(*dpo.policy_model.parameters())
    return sum(storages(*dpo.parameters()).values()) - sum(policy.values())


@pytest.mark.parametrize("name", INITIALIZATIONS)
def test_an_adapter_costs_at_most_its_own_weights_again(name):
    policy = adapt(name)
    trained = sum(storages(*(p for p in policy.parameters() if p.requires_grad)).values())
    dpo = DPO(policy)
    is_switched_off = name in ("default", "gaussian", "rslora")
    assert (dpo.ref_model is None) == is_switched_off
    assert extra_bytes(dpo) == (0 if is_switched_off else trained)
    loss = dpo(**arguments(random_batch(Generator().manual_seed(0), odd=0)))
    assert abs(loss - torch.tensor(2.0).log()) < 1e-6  # the reference starts as the policy


def test_a_loaded_adapter_costs_its_own_weights_again(tmp_path):
    trained = adapt("default")
    nudged(nn.ParameterList([p for p in trained.parameters() if p.requires_grad]), 0.1)
    trained.save_pretrained(tmp_path)
    policy = peft.PeftModel.from_pretrained(hf_llama(0), tmp_path, is_trainable=True)
    dpo = DPO(policy)
    assert extra_bytes(dpo) == sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    loss = dpo(**arguments(random_batch(Generator().manual_seed(0), odd=0)))
    assert abs(loss - torch.tensor(2.0).log()) < 1e-6
