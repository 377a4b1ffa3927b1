"""Whether llama.cpp puts a BOS token in front of a text, by what stands in a GGUF file."""

from pathlib import Path
from typing import Any

_ADD_BOS = {
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
    "tekken", "chameleon",
}  # fmt: skip
"""Tokenizers of GPT-2's kind that llama.cpp lets begin with a BOS, where a file does not say it."""


def adds_bos_token(file: Path) -> bool:
    """Whether the tokenizer of a GGUF file puts a BOS in front of every text."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields

    def read(name: str) -> Any:
        field = fields.get(f"tokenizer.ggml.{name}")
        return None if field is None else field.contents()

    flag = read("add_bos_token")
    if flag is not None:
        return bool(flag)
    return bool(read("model") == "llama" or read("pre") in _ADD_BOS)
