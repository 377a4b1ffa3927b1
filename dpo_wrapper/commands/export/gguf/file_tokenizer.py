"""The tokenizer that a GGUF file describes, by llama.cpp's rules."""

import heapq
import json
import re
from typing import Any

from dpo_wrapper.commands.export.gguf.byte_level import PRE_TOKENIZERS

KEEPS = ("", "<unk>", "<s>", "<|endoftext|>")
"""Behind these llama.cpp does not strip spaces, even in Phi-3."""


class FileTokenizer:
    """Text -> ids by the keys of a file, with special tokens where a text spells them."""

    def __init__(self, fields: dict[str, Any]) -> None:
        from gguf import TokenType

        def read(name: str, default: Any = None) -> Any:
            return fields.get(f"tokenizer.ggml.{name}", default)

        tokens, types = read("tokens"), read("token_type")
        kept = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
        self._ids = {token: index for index, token in enumerate(tokens)}
        special = [token for token, kind in zip(tokens, types, strict=True) if kind in kept]
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._bos = read("bos_token_id") if read("add_bos_token", False) else None
        self._strips = "phi-3" in fields.get("general.name", "")
        self._is_byte_level = read("model") == "gpt2"
        if self._is_byte_level:
            self._byte_level = build_byte_level(self._ids, read("merges"), read("pre"))
        else:
            self._scores = read("scores")
            self._has_space_in_front = read("add_space_prefix", True)

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = [] if self._bos is None else [self._bos]
        before = ""
        for position, part in enumerate(self._special.split(text)):
            if position % 2:
                ids.append(self._ids[part])
                before = part
            else:
                ids += self._tokenize_text(part.lstrip() if self._strips and before not in KEEPS else part)
        return ids[1:] if self._bos is not None and ids[:2] == [self._bos, self._bos] else ids

    def _tokenize_text(self, text: str) -> list[int]:
        """The ids of a text at the beginning or behind a special token."""
        if not text:
            return []
        if self._is_byte_level:
            return list(self._byte_level.encode(text).ids)
        return self._merge(list((" " * self._has_space_in_front + text).replace(" ", "▁")))

    def _merge(self, symbols: list[str]) -> list[int]:
        """Join the neighbours with the best joint score, the leftmost of equals, until none have one."""
        following = [*range(1, len(symbols)), -1]
        preceding = list(range(-1, len(symbols) - 1))
        queue: list[tuple[float, int, str]] = []

        def push(left: int) -> None:
            if left >= 0 and following[left] >= 0:
                joint = symbols[left] + symbols[following[left]]
                if joint in self._ids:
                    heapq.heappush(queue, (-self._scores[self._ids[joint]], left, joint))

        for left in range(len(symbols)):
            push(left)
        while queue:
            _, left, joint = heapq.heappop(queue)
            right = following[left]
            if not symbols[left] or right < 0 or symbols[left] + symbols[right] != joint:
                continue
            symbols[left], symbols[right] = joint, ""
            following[left] = following[right]
            if following[right] >= 0:
                preceding[following[right]] = left
            push(preceding[left])
            push(left)
        return [index for symbol in symbols if symbol for index in self._find_ids(symbol)]

    def _find_ids(self, symbol: str) -> list[int]:
        if symbol in self._ids:
            return [self._ids[symbol]]
        return [self._ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]


def build_byte_level(ids: dict[str, int], merges: list[str], pre: str) -> Any:
    """A tokenizer of the tokenizers library."""
    from tokenizers import Tokenizer

    steps, ignores_merges = PRE_TOKENIZERS[pre]
    trim = {"trim_offsets": False}
    parts: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [step | (trim if step["type"] == "ByteLevel" else {}) for step in steps],
        },
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "vocab": ids,
            "merges": [merge.split(" ") for merge in merges],
            "ignore_merges": ignores_merges,
        },
    }
    return Tokenizer.from_str(json.dumps(parts))
