"""Tiny models of the families that other programs load, with a chat template, and adapters on them."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.data.tokens.tokenizers import load_tokenizer
from dpo_wrapper.pretrained import AdapterOrigin, PretrainedModel, save_pretrained
from helpers.models import randomise_, seeded
from helpers.tokenizers import CHATML, save_tokenizer

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")

COMMON: dict[str, Any] = {
    "vocab_size": 448,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GEMMA = {"tie_word_embeddings": True, "query_pre_attn_scalar": 8, "sliding_window": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA
    | {
        "sliding_window_pattern": 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0},
        },
    },
    "phi3": {},
}
"""What each differs in from `COMMON`, by the `model_type` of transformers."""

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def save_base(folder: Path, family: str = "llama", *, template: str = CHATML, **options: Any) -> Path:
    """A random model of a family, with grouped-query heads and a theta that is no program's default."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(family, **deepcopy(COMMON | FAMILIES.get(family, {}) | options))
    with seeded(0):
        model = randomise_(AutoModelForCausalLM.from_config(settings, dtype=torch.float32))
    model.save_pretrained(folder)
    return save_tokenizer(folder, eos="<|im_end|>", puts_bos=False, template=template)


@torch.no_grad()
def save_lora(folder: Path, base: Path, **options: Any) -> Path:
    """An adapter of all linear layers, or of what PEFT's options say, which changes the base much."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = FUSED if model.config.model_type == "phi3" else LINEAR
    defaults = {"r": 4, "lora_alpha": 10, "target_modules": list(targets), "task_type": "CAUSAL_LM"}
    with seeded(1):
        model = get_peft_model(model, LoraConfig(**(defaults | options)))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    origin = AdapterOrigin(str(base))
    save_pretrained(PretrainedModel(model, load_tokenizer(base), str(base), None, origin), model, folder)
    return folder


def make_export_config(model: Path, out: Path, *to: str, **options: Any) -> ExportConfig:
    """Two short prompts, in float32."""
    defaults = {"prompts": ("How are you?", "I am fine,"), "num_tokens": 3, "dtype": "float32"}
    return ExportConfig(model=str(model), to=to, out=out, **(defaults | options))
