"""Byte-level BPE: which of llama.cpp's ways to cut a text into words a tokenizer has."""

import json
from collections.abc import Sequence
from typing import Any

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST
QWEN_2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (
    r"[^\r\n\p{L}\p{N}]?" + UPPER + "*" + LOWER + "+%s"
    r"|[^\r\n\p{L}\p{N}]?" + UPPER + "+" + LOWER + "*%s"
)  # fmt: skip
SLASHED_REST = REST.replace(r"[\r\n]*", r"[\r\n/]*")
TEKKEN = CASED % ("", "") + r"|\p{N}" + SLASHED_REST
GPT_4O = CASED % (CONTRACTIONS + "?", CONTRACTIONS + "?") + r"|\p{N}{1,3}" + SLASHED_REST

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
GPT_2_WORDS = BYTES | {"use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def split_by(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


PRE_TOKENIZERS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([GPT_2_WORDS], False),
    "smollm": ([DIGITS, GPT_2_WORDS], False),
    "llama-bpe": ([split_by(LLAMA_3), BYTES], True),
    "smaug-bpe": ([split_by(LLAMA_3), BYTES], False),
    "qwen2": ([split_by(QWEN_2), BYTES], False),
    "tekken": ([split_by(TEKKEN), BYTES], True),
    "gpt-4o": ([split_by(GPT_4O), BYTES], False),
}
"""By llama.cpp's names: the steps of the pre-tokenizer in a tokenizer.json, and whether a word that is a
token needs no merges."""


def find_pre_tokenizer(parts: dict[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer in a tokenizer.json.

    Raises:
        ValueError: it is none that llama.cpp has, or the tokenizer changes texts in other ways.
    """
    model, normalizer = parts["model"], parts["normalizer"]
    affixes = [model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")]
    if any(affixes) or model.get("dropout") or (normalizer or {"type": "NFC"})["type"] != "NFC":
        raise ValueError(
            "the tokenizer should be a plain byte-level BPE for llama.cpp, but it has a normalizer, affixes "
            "or dropout: use --to merged."
        )
    steps = list_steps(parts["pre_tokenizer"])
    for name, (known, ignores_merges) in PRE_TOKENIZERS.items():
        if steps == known and bool(model.get("ignore_merges")) == ignores_merges:
            return name
    raise ValueError(
        f"the tokenizer should cut texts as {', '.join(PRE_TOKENIZERS)} do for --to gguf, but it does so by "
        f"{json.dumps(steps)}: use --to merged, and llama.cpp's own convert_hf_to_gguf.py."
    )


def list_steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, without what changes no token."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps if step]


def format_merges(merges: Sequence[Any]) -> list[str]:
    """Merges as llama.cpp reads them: two parts with a space between."""
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
