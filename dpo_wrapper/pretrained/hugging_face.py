"""Causal language models of transformers, by folder or name."""

from collections.abc import Mapping
from typing import Any

import torch

from dpo_wrapper.data.tokens.tokenizers import load_tokenizer
from dpo_wrapper.pretrained.decoder import PRESETS
from dpo_wrapper.pretrained.model import PretrainedModel


def load_hugging_face(
    name: str, tokenizer_name: str, tokenizer_options: Mapping[str, Any], quantization_config: Any = None
) -> PretrainedModel:
    from transformers import AutoModelForCausalLM

    options = {} if quantization_config is None else {"quantization_config": quantization_config}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--model should be {', '.join(PRESETS)}, a run folder or a Hugging Face causal LM by folder or "
            f"name, but {name} could not be loaded: {reason}"
        ) from error
    return PretrainedModel(model, load_tokenizer(tokenizer_name, **tokenizer_options), tokenizer_name, None)
