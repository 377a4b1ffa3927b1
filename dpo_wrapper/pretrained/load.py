"""Load a model with its tokenizer."""

from collections.abc import Mapping
from typing import Any

import torch

from dpo_wrapper.pretrained.adapter import find_base, is_adapter_folder, load_adapter, own_tokenizer
from dpo_wrapper.pretrained.decoder import PRESETS, build_preset, cast_decoder, load_decoder
from dpo_wrapper.pretrained.decoder_file import build_from_file, is_decoder_file
from dpo_wrapper.pretrained.hugging_face import load_hugging_face
from dpo_wrapper.pretrained.model import PretrainedModel, read_settings


def load_pretrained(
    name: str,
    tokenizer_name: str | None,
    max_length: int,
    tokenizer_options: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    attn_implementation: str | None = None,
    quantization_config: Any = None,
) -> PretrainedModel:
    """Load or build a model with its tokenizer.

    Args:
        name: one of `PRESETS`, or a .json file of a decoder's arguments, which build a new decoder; a folder
            that `save_pretrained` wrote; the folder of an adapter, which is loaded on the base that it names;
            or a Hugging Face causal LM by folder or name.
        tokenizer_name: as in `load_tokenizer`; None for the model's own (bytes for a new decoder).
        max_length: maximum sequence length of a new decoder, in tokens.
        tokenizer_options: as in `load_tokenizer`.
        dtype: of the weights; None for that in which they are stored.
        attn_implementation: of a Hugging Face model, by transformers' names; None for its own choice.
        quantization_config: how transformers quantizes a Hugging Face model, whose weights cannot train then.

    Raises:
        ValueError: the folder holds no model, or the model cannot be loaded.
        ImportError: the folder holds an adapter, and peft is missing.
    """
    options = tokenizer_options or {}
    loading: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "quantization_config": quantization_config,
    }
    if is_adapter_folder(name):
        base_name, own = find_base(name), tokenizer_name or own_tokenizer(name)
        return load_adapter(name, load_pretrained(base_name, own, max_length, options, **loading), base_name)
    is_file = is_decoder_file(name)
    settings = {} if name in PRESETS or is_file else read_settings(name)
    is_decoder = name in PRESETS or is_file or "x_transformers" in settings
    if not is_decoder:
        return load_hugging_face(name, tokenizer_name, options, **loading)
    if attn_implementation is not None:
        raise ValueError(
            "--attn-implementation should be given for a Hugging Face model, but this one is of "
            "x-transformers: leave it out, and set attn_flash in the decoder's arguments."
        )
    if quantization_config is not None:
        raise ValueError(
            f"--load-in-4bit should be given with a Hugging Face model, but {name} is one of x-transformers: "
            "leave it out."
        )
    if "x_transformers" in settings:
        return load_decoder(name, settings, tokenizer_name, options, dtype)
    build = build_from_file if is_file else build_preset
    pretrained = build(name, tokenizer_name or "bytes", max_length, options)
    cast_decoder(pretrained.model, dtype or torch.float32)
    return pretrained
