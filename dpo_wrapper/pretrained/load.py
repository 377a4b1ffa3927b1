"""Load a model with its tokenizer."""

from collections.abc import Mapping
from typing import Any

from dpo_wrapper.pretrained.adapter import find_base, is_adapter_folder, load_adapter, own_tokenizer
from dpo_wrapper.pretrained.decoder import PRESETS, build_preset, load_decoder
from dpo_wrapper.pretrained.hugging_face import load_hugging_face
from dpo_wrapper.pretrained.model import PretrainedModel, read_settings


def load_pretrained(
    name: str,
    tokenizer_name: str | None,
    max_length: int,
    tokenizer_options: Mapping[str, Any] | None = None,
    quantization_config: Any = None,
) -> PretrainedModel:
    """Load or build a model in float32, with its tokenizer.

    Args:
        name: one of `PRESETS`, which builds a new decoder; a folder that `save_pretrained` wrote; the
            folder of an adapter, which is loaded on the base that it names; or a Hugging Face causal LM by
            folder or name.
        tokenizer_name: as in `load_tokenizer`; None for the model's own (bytes for a new decoder).
        max_length: maximum sequence length of a new decoder, in tokens.
        tokenizer_options: as in `load_tokenizer`.
        quantization_config: how transformers quantizes a Hugging Face model, whose weights cannot train then.

    Raises:
        ValueError: the folder holds no model, or the model cannot be loaded.
        ImportError: the folder holds an adapter, and peft is missing.
    """
    options = tokenizer_options or {}
    if name in PRESETS:
        return build_preset(name, tokenizer_name or "bytes", max_length, options)
    if is_adapter_folder(name):
        base_name = find_base(name)
        base = load_pretrained(
            base_name, tokenizer_name or own_tokenizer(name), max_length, options, quantization_config
        )
        return load_adapter(name, base, base_name)
    settings = read_settings(name)
    if quantization_config is not None and "x_transformers" in settings:
        raise ValueError(
            f"--load-in-4bit should be given with a Hugging Face model, but {name} is one of x-transformers: "
            "leave it out."
        )
    if "x_transformers" in settings:
        return load_decoder(name, settings, tokenizer_name, options)
    return load_hugging_face(name, tokenizer_name or name, options, quantization_config)
