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
    normalizer, pre_tokenizer = parts["normalizer"] or {}, parts["pre_tokenizer"] or {}
    normalizers = normalizer.get("normalizers", [normalizer] if normalizer else [])
    if pre_tokenizer.get("type") == "Metaspace":
        is_known = not normalizers and pre_tokenizer["replacement"] == "▁" and not pre_tokenizer["split"]
    else:
        cuts_nothing = pre_tokenizer.get("pattern") == {"String": " "}  # no space is left to cut at
        is_known = normalizers in ([SPACE], [PREFIX, SPACE]) and (not pre_tokenizer or cuts_nothing)
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
        places.setdefault("".join(split_merge(merge)), place)
    return [-float(places[token]) if token in places else NO_MERGE for token in tokens]


def count_unlisted_merges(tokens: Sequence[str], merges: Sequence[Any]) -> int:
    """The number of tokens that llama.cpp joins from two parts where the tokenizer does not.

    It is 0 for what was made from a SentencePiece model, which lists all pairs.
    """
    vocab, listed = set(tokens), {tuple(split_merge(merge)) for merge in merges}
    return sum(
        any(
            token[:k] in vocab and token[k:] in vocab and (token[:k], token[k:]) not in listed
            for k in range(1, len(token))
        )
        for token in tokens
    )


def split_merge(merge: Any) -> list[str]:
    """The two parts of a merge, as old files have them too."""
    return merge.split(" ") if isinstance(merge, str) else list(merge)


def find_token_type(text: str, unknown: str | None) -> Any:
    """The type of a token that is in the vocabulary of merges."""
    from gguf import TokenType

    if text == unknown:
        return TokenType.UNKNOWN
    return TokenType.BYTE if BYTE.fullmatch(text) else TokenType.NORMAL
