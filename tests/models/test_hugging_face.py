"""Families of transformers: loss and gradients are those from their full logits."""

from typing import Any

import pytest
import torch
from torch import nn

from dpo_wrapper import DPO
from helpers.dpo_calls import nudged
from helpers.kernels import probes
from helpers.marks import mark_slow_except
from helpers.models import CONTEXT, DIM, VOCAB, randomise_, seeded
from helpers.naive_dpo import ARGUMENTS, naive_loss

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": 2 * DIM,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
}
STATE_SPACE = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "state_size": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", SIZES | {"num_local_experts": 4}),
    "mamba": ("Mamba", STATE_SPACE),
    "mamba2": ("Mamba2", STATE_SPACE | {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}),
    "mistral, window 3": ("Mistral", SIZES | {"sliding_window": 3}),
    "mistral, window 3, eager": ("Mistral", SIZES | {"sliding_window": 3, "attn_implementation": "eager"}),
    "qwen2": ("Qwen2", SIZES),
    "cohere": ("Cohere", SIZES | {"logit_scale": 0.3}),
    "granite": ("Granite", SIZES | {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "gemma3": ("Gemma3", SIZES | {"head_dim": 8, "sliding_window": 3, "final_logit_softcapping": 3.0}),
    "recurrent gemma": (
        "RecurrentGemma",
        {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "max_position_embeddings")}
        | {"num_hidden_layers": 3, "lru_width": DIM, "attention_window_size": 4, "logits_soft_cap": 3.0},
    ),
    "gptj": ("GPTJ", {"vocab_size": VOCAB, "n_embd": DIM, "n_layer": 2, "n_head": 2, "rotary_dim": 4}),
}


def build(name: str) -> nn.Module:
    import transformers

    family, config = FAMILIES[name]
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    with seeded(0):
        return randomise_(getattr(transformers, f"{family}ForCausalLM")(config_class(**config)), std=0.2)


SLOW = {"mamba2", "mistral, window 3, eager", "qwen2", "granite"}


@pytest.mark.parametrize("name", mark_slow_except(FAMILIES.keys() - SLOW, FAMILIES))
def test_families_of_transformers_equal_their_full_logits(name):
    reference = build(name).eval()
    dpo = DPO(build(name))
    policy = nudged(dpo.policy_model)
    loss = dpo(**ARGUMENTS)
    loss.backward()
    assert all(probe.head_applies for probe in probes(dpo))
    gradients = {name: p.grad for name, p in policy.named_parameters()}
    dpo.zero_grad()
    expected = naive_loss(policy, reference)
    expected.backward()
    assert torch.allclose(loss, expected, atol=1e-5)
    for name, p in policy.named_parameters():
        expected_gradient = torch.zeros_like(p) if p.grad is None else p.grad
        gradient = torch.zeros_like(p) if gradients[name] is None else gradients[name]
        assert torch.allclose(gradient, expected_gradient, atol=1e-5, rtol=1e-3), name
