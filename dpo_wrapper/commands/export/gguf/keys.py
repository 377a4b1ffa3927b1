"""All keys of a GGUF file but for its tensors: settings, vocabulary, and what it is called."""

import re
from pathlib import Path
from typing import Any

from dpo_wrapper.commands.export.config import Quantization
from dpo_wrapper.commands.export.gguf.families import find_family
from dpo_wrapper.commands.export.gguf.hyperparameters import add_hyperparameters
from dpo_wrapper.commands.export.gguf.storage import FILE_TYPES, check_quantizer
from dpo_wrapper.commands.export.gguf.vocabulary import add_vocabulary
from dpo_wrapper.data.tokens.tokenizers import Tokenizer
from dpo_wrapper.pretrained.gguf_adapter import import_gguf

PHI_3_TOKENS = {"<unk>", "<s>", "</s>", "<|endoftext|>"}


def check_model(model: Any, tokenizer: Tokenizer, quantization: Quantization) -> None:
    """Raise for what cannot be written as a GGUF file, by all that can be told without its tensors.

    Args:
        model: of transformers, or PEFT's on one.

    Raises:
        ValueError: llama.cpp does not know the model or its tokenizer.
        ImportError: a library or program that is needed is missing.
    """
    gguf = import_gguf()
    check_quantizer(quantization)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    add_keys(gguf.GGUFWriter(None, find_family(base).architecture), base, tokenizer, "float32")


def add_keys(writer: Any, model: Any, tokenizer: Tokenizer, dtype: str) -> list[str]:
    """Add the keys of a model; returns sentences on what a user should know. Arguments as in the writer's."""
    gguf = import_gguf()
    family = find_family(model)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(make_name(model, tokenizer))
    writer.add_file_type(FILE_TYPES[dtype])
    if dtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    notes = add_hyperparameters(writer, model, family)
    return notes + add_vocabulary(writer, tokenizer, len(model.get_input_embeddings().weight))


def make_name(model: Any, tokenizer: Tokenizer) -> str:
    """The name of the model, with "phi-3" in it where special tokens strip the spaces behind them.

    It is by this part of a name that llama.cpp strips them; it needs Phi-3's own tokens then.
    """
    name = re.sub("phi-?3", "phi 3", Path(model.config.name_or_path or "model").name.lower())
    special = getattr(tokenizer, "tokenizer", None)
    if special is None or not special.get_vocab().keys() >= PHI_3_TOKENS:
        return name
    strips = any(token.rstrip for token in special.added_tokens_decoder.values())
    return f"phi-3 {name}" if strips else name
