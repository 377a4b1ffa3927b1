"""BPE with a token for each byte, as SentencePiece has it, whose merges llama.cpp takes as scores."""

import re
from collections.abc import Sequence
from typing import Any

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREFIX = {"type": "Prepend", "prepend": "▁"}
NO_MERGE = -1e6
"""The score of what no merge makes; smaller than that of any merge."""


def check_sentence_piece(parts: dict[str, Any]) -> None:
    """Raise ValueError for a tokenizer.json that changes texts in a way that llama.cpp does not know."""
    normalizer, pre_tokenizer = parts["normalizer"], parts["pre_tokenizer"]
    normalizers = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    is_known = normalizers in ([SPACE], [PREFIX, SPACE]) and (
        pre_tokenizer is None
        or (pre_tokenizer["type"] == "Split" and pre_tokenizer["pattern"] == {"String": " "})
    )
    if not normalizers and pre_tokenizer is not None and pre_tokenizer["type"] == "Metaspace":
        is_known = pre_tokenizer["replacement"] == "▁" and pre_tokenizer.get("split") is False
    if not is_known:
        raise ValueError(
            "the tokenizer should write spaces as ▁ and do nothing else to a text for llama.cpp, but its "
            "normalizer or pre-tokenizer does more: use --to merged."
        )
    missing = {f"<0x{byte:02X}>" for byte in range(256)} - set(parts["model"]["vocab"])
    if missing:
        raise ValueError(
            f"the tokenizer should have a token for each byte for llama.cpp, but {min(missing)} is missing: "
            "use --to merged."
        )


def compute_scores(tokens: Sequence[str], merges: Sequence[Any]) -> list[float]:
    """Scores by which llama.cpp merges in the order of the merges: minus the place of a token's first one.

    llama.cpp joins the two neighbours whose joint token has the largest score, the leftmost of equals.
    """
    places: dict[str, int] = {}
    for place, merge in enumerate(merges):
        text = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        places.setdefault(text, place)
    return [-float(places[token]) if token in places else NO_MERGE for token in tokens]


def find_token_type(text: str, unknown: str | None) -> Any:
    """The type of a token that is in the vocabulary of merges."""
    from gguf import TokenType

    if text == unknown:
        return TokenType.UNKNOWN
    return TokenType.BYTE if BYTE.fullmatch(text) else TokenType.NORMAL
