"""Causal language models of transformers, by folder or name."""

from collections.abc import Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dpo_wrapper.data.tokens.tokenizers import load_tokenizer
from dpo_wrapper.libraries.error_text import summarize_error
from dpo_wrapper.libraries.hub import NotOnHubError, find_on_hub
from dpo_wrapper.pretrained.decoder import PRESETS
from dpo_wrapper.pretrained.gguf_file import find_gguf, load_gguf
from dpo_wrapper.pretrained.model import PretrainedModel


def load_hugging_face(
    name: str,
    tokenizer_name: str | None,
    tokenizer_options: Mapping[str, Any],
    dtype: torch.dtype | None,
    attn_implementation: str | None,
    quantization_config: Any = None,
) -> PretrainedModel:
    """The model and its tokenizer; arguments as in `load_pretrained`."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ImportError(
            "Hugging Face models need transformers: pip install 'dpo-wrapper[train]'."
        ) from error
    check_attention(attn_implementation)
    files = find_model(name)
    options: dict[str, Any] = {"dtype": dtype or "auto"}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    try:
        config = AutoConfig.from_pretrained(files)
        check_quantization(name, config)
        gguf_file = find_gguf(files)
        if gguf_file is not None:
            model = load_gguf(gguf_file, config, **options | {"dtype": dtype or torch.float32})
        else:
            model = AutoModelForCausalLM.from_pretrained(files, **options)
    except QuantizationError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"--model should be a causal LM that transformers can load, but {name} could not be loaded "
            f"({summarize_error(error)}): check the folder and the options."
        ) from error
    tokenizer = load_tokenizer(tokenizer_name or files, **tokenizer_options)
    return PretrainedModel(model, tokenizer, tokenizer_name or name, None)


def find_model(name: str) -> str:
    """What transformers can load the model from; ValueError that names what may have been meant."""
    kinds = "a .json file, a run folder or a Hugging Face causal LM by folder or name"
    expected = f"--model should be {', '.join(PRESETS)}, {kinds}"
    if "/" not in name and (close := get_close_matches(name, PRESETS, n=1, cutoff=0.75)):
        raise ValueError(f"{expected}, but it is {name}: did you mean {close[0]}?")
    if Path(name).is_file():
        raise ValueError(f"{expected}, but {name} is a file: give the folder that it is in.")
    try:
        return find_on_hub(name)
    except NotOnHubError as error:
        remedy = "check the name."
        folder = Path(name).parent
        siblings = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
        if close := get_close_matches(Path(name).name, siblings, n=1):
            remedy = f"did you mean {folder / close[0]}?"
        raise ValueError(f"{expected}, but it is {name}, and {error}: {remedy}") from error


class QuantizationError(ValueError):
    """A quantised checkpoint cannot be loaded here."""


def check_quantization(name: str, config: Any) -> None:
    """Raise ValueError for a quantised checkpoint where nothing can compute it."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = getattr(settings.get("quant_method"), "value", settings.get("quant_method")) or "bitsandbytes"
    lacks = [] if torch.cuda.is_available() else ["a CUDA GPU"]
    if method == "bitsandbytes" and find_spec("bitsandbytes") is None:
        lacks.append("bitsandbytes (pip install bitsandbytes)")
    if lacks:
        raise QuantizationError(
            f"--model should be a model that can be computed here, but {name} is quantised ({method}), for "
            f"which {' and '.join(lacks)} would be needed: name the model as it was before it was quantised."
        )


def check_attention(name: str | None) -> None:
    """Raise ValueError for an attention that transformers does not know."""
    from transformers import AttentionInterface

    known = ["eager", *sorted(key for key in AttentionInterface().valid_keys() if "|" not in key)]
    if name is None or name in known or "/" in name:  # with a slash it is a kernel on the hub
        return
    close = get_close_matches(name, known, n=1)
    remedy = f"did you mean {close[0]}?" if close else "choose one of these."
    raise ValueError(f"--attn-implementation should be {', '.join(known)}, but it is {name}: {remedy}")
