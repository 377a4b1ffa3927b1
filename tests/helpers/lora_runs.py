"""Bases of LoRA runs in tests, and what is common to these runs."""

from pathlib import Path

import torch
from torch import nn

from dpo_wrapper.data.tokens.tokenizers import load_tokenizer
from dpo_wrapper.pretrained import PRESETS, PretrainedModel, save_pretrained
from dpo_wrapper.pretrained.decoder import build_preset
from helpers.models import hf_llama, seeded
from helpers.runs import make_config

IDS = torch.arange(20)[None]


def save_llama(folder: Path, **options: object) -> Path:
    """A tiny Llama that reads bytes."""
    model = hf_llama(0, **({"vocab_size": 300, "max_position_embeddings": 256} | options))
    save_pretrained(PretrainedModel(model, load_tokenizer("bytes"), "bytes", None), model, folder)
    return folder


def save_decoder(folder: Path) -> Path:
    """A tiny decoder of x-transformers that reads bytes; `tiny` should be small."""
    assert PRESETS["tiny"]["dim"] < 64
    with seeded(0):
        pretrained = build_preset("tiny", "bytes", 128, {})
    save_pretrained(pretrained, pretrained.model, folder)
    return folder


def make_lora_config(rows: Path, out: Path, model: Path, **options: object):
    """Preferences alone, at a rate that changes much in few steps; without checkpoints."""
    defaults = {"sft_epochs": 0, "epochs": 1, "save_steps": 0, "learning_rate": 1e-2}
    if "lora" not in options and "adapter" not in options:
        defaults["lora"] = True
    return make_config(rows, out, model=str(model), **(defaults | options))


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    """The model's logits of some ids, in eval mode."""
    output = model.eval()(IDS)
    return getattr(output, "logits", output)
