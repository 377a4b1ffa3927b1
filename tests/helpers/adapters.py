import pytest
import torch


def lora(model, **kwargs):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, **kwargs)
    return peft.get_peft_model(model, config)
