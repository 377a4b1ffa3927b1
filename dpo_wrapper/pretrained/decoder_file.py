"""New x-transformers decoders by a JSON file of the arguments of their constructors."""

import json
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dpo_wrapper.data.tokens.tokenizers import load_tokenizer
from dpo_wrapper.pretrained.decoder import build_decoder
from dpo_wrapper.pretrained.model import PretrainedModel


def is_decoder_file(name: str) -> bool:
    """Whether `--model` names a JSON file of a decoder's arguments."""
    return name.endswith(".json")


def build_from_file(
    name: str, tokenizer_name: str, max_length: int, tokenizer_options: Mapping[str, Any]
) -> PretrainedModel:
    """A new decoder: the file holds arguments of `TransformerWrapper`, and `attn_layers` those of `Decoder`.

    `num_tokens` is by default the tokenizer's vocabulary, and `max_seq_len` is `max_length`.

    Raises:
        ValueError: the file cannot be read, or x-transformers cannot build a language model from it.
    """
    arguments = read_arguments(name)
    tokenizer = load_tokenizer(tokenizer_name, **tokenizer_options)
    decoder_args = {"num_tokens": tokenizer.vocab_size, "max_seq_len": max_length, **arguments}
    num_tokens = decoder_args["num_tokens"]
    if not isinstance(num_tokens, int) or num_tokens < tokenizer.vocab_size:
        raise ValueError(
            f"num_tokens in {name} should be at least {tokenizer.vocab_size}, the vocabulary of the "
            f"tokenizer {tokenizer_name}, but it is {num_tokens}: leave it out."
        )
    return PretrainedModel(try_to_build(name, decoder_args), tokenizer, tokenizer_name, decoder_args)


def read_arguments(name: str) -> dict[str, Any]:
    """The content of the file, a dict with a dict `attn_layers`."""
    try:
        arguments = json.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"--model should be a file that can be read, but {name} cannot ({error.strerror}): check the "
            "path."
        ) from error
    except ValueError as error:
        raise ValueError(f"--model should be valid JSON, but {name} is not ({error}): correct it.") from error
    if not isinstance(arguments, dict) or not isinstance(arguments.get("attn_layers"), dict):
        raise ValueError(
            f"{name} should hold arguments of TransformerWrapper of x-transformers and, as attn_layers, a "
            "dict of those of Decoder, but it has no such dict: add it."
        )
    return arguments


def try_to_build(name: str, decoder_args: dict[str, Any]) -> nn.Module:
    """The decoder; ValueError with x-transformers' reason where it is none, or returns no logits."""
    try:
        model = build_decoder(decoder_args)
        if getattr(model, "to_logits", None) is None:
            raise ValueError("return_only_embed leaves the output head out")
    except Exception as error:  # mostly assertions, some of them without a message
        line = traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__
        reason = (str(error).strip() or line).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{name} should hold arguments that x-transformers can build a decoder from, but it cannot "
            f"({reason}): correct them."
        ) from error
    return model
