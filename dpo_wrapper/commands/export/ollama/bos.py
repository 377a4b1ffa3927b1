"""Whether llama.cpp puts a BOS token in front of a text, by what stands in a GGUF file."""

from pathlib import Path

from dpo_wrapper.pretrained.gguf_adapter import open_gguf, read_field

_ADD_BOS = {
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
    "tekken", "chameleon",
}  # fmt: skip
"""Tokenizers of GPT-2's kind that llama.cpp lets begin with a BOS, where a file does not say it."""


def adds_bos_token(file: Path) -> bool:
    """Whether the tokenizer of a GGUF file puts a BOS in front of every text."""
    reader = open_gguf(file)
    flag, model, pre = (
        read_field(reader, f"tokenizer.ggml.{name}") for name in ("add_bos_token", "model", "pre")
    )
    return bool(model == "llama" or pre in _ADD_BOS) if flag is None else bool(flag)
