"""x-transformers decoders: build new ones, and load those that a run has saved."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_wrapper.data.tokens.tokenizers import load_tokenizer
from dpo_wrapper.pretrained.model import WEIGHTS_FILE, PretrainedModel

PRESETS = {
    "tiny": {"dim": 128, "depth": 4, "heads": 2},
    "small": {"dim": 256, "depth": 6, "heads": 4},
    "medium": {"dim": 512, "depth": 8, "heads": 8},
}
"""Sizes of the decoders that are built from scratch, by name."""


def build_preset(
    name: str, tokenizer_name: str, max_length: int, tokenizer_options: Mapping[str, Any]
) -> PretrainedModel:
    """A new decoder with rotary positions, flash attention, RMSNorm and SwiGLU."""
    tokenizer, size = load_tokenizer(tokenizer_name, **tokenizer_options), PRESETS[name]
    decoder_args = {
        "num_tokens": tokenizer.vocab_size,
        "max_seq_len": max_length,
        "use_abs_pos_emb": False,
        "attn_layers": {
            **size,
            "attn_dim_head": size["dim"] // size["heads"],
            "rotary_pos_emb": True,
            "attn_flash": True,
            "use_rmsnorm": True,
            "ff_swish": True,
            "ff_glu": True,
            "ff_no_bias": True,
        },
    }
    return PretrainedModel(build_decoder(decoder_args), tokenizer, tokenizer_name, decoder_args)


def build_decoder(decoder_args: dict[str, Any]) -> nn.Module:
    """`TransformerWrapper(**decoder_args, attn_layers = Decoder(**decoder_args['attn_layers']))`."""
    from x_transformers import Decoder, TransformerWrapper

    return TransformerWrapper(**{**decoder_args, "attn_layers": Decoder(**decoder_args["attn_layers"])})


def cast_decoder(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a decoder in place, but for the frequencies of rotary positions, which would move positions."""
    rotary = [module for module in model.modules() if type(module).__name__ == "RotaryEmbedding"]
    buffers = [(module, name, buffer) for module in rotary for name, buffer in module.named_buffers()]
    model.to(dtype)
    for module, name, buffer in buffers:
        module.register_buffer(name, buffer)
    return model


def load_decoder(
    folder: str,
    settings: dict[str, Any],
    tokenizer_name: str | None,
    tokenizer_options: Mapping[str, Any],
    dtype: torch.dtype | None,
) -> PretrainedModel:
    """The x-transformers decoder in a folder that `save_pretrained` wrote; dtype None for the stored one."""
    from safetensors.torch import load_model

    tokenizer_name = tokenizer_name or settings["tokenizer"]
    if tokenizer_name == settings["tokenizer"] == ".":
        tokenizer_name = folder
    dtype = dtype or getattr(torch, settings.get("dtype", "float32"))
    model = cast_decoder(build_decoder(settings["x_transformers"]), dtype)
    load_model(model, Path(folder) / WEIGHTS_FILE)
    tokenizer = load_tokenizer(tokenizer_name, **tokenizer_options)
    return PretrainedModel(model, tokenizer, tokenizer_name, settings["x_transformers"])
