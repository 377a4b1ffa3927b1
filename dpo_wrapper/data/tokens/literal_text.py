"""Text with marks -> token ids, in which only unmarked spellings of special tokens are those tokens."""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

from dpo_wrapper.data.tokens.chat_template import MARK

_QUOTE = "\U0010fffc"  # begins and ends the other spelling of a special token

_NOT_AS_TEXT = (
    "special tokens that a text spells should stay text, but this tokenizer cannot read them as text: leave "
    "the row out, or use the fast form of the tokenizer."
)

_NO_OFFSETS = (
    "masked spans should have a fast tokenizer, which says where tokens stand in the text, but this one is "
    "slow: use the fast form of the tokenizer."
)

MAX_PARTS = 64
"""How many parts of texts are remembered: those of a few examples."""


class LiteralEncoder:
    """Encodes text for a tokenizer of transformers, so that marked spellings of special tokens stay text.

    A fast tokenizer splits a text at added tokens before it does anything else. So a text is cut in front of
    them, and parts that several texts have in common, such as the turns of a prompt, are encoded once.

    Args:
        tokenizer: a tokenizer of transformers.
        special_pattern: matches the tokens that structure a dialogue.
        token_pattern: matches all added tokens.
    """

    def __init__(
        self, tokenizer: Any, special_pattern: re.Pattern[str], token_pattern: re.Pattern[str]
    ) -> None:
        self.tokenizer = tokenizer
        self.special_pattern = special_pattern
        self.token_pattern = token_pattern
        self.backend: Any = None  # a copy of the tokenizer's own, with another spelling of each special token
        self.spellings: dict[str, str] = {}
        self.special_ids: dict[int, int] = {}
        self.control_ids: set[int] = set()
        self.fast_backend = find_fast_backend(tokenizer)
        self.cutting_tokens = set()
        if self.fast_backend is not None:
            added = tokenizer.added_tokens_decoder.values()
            self.cutting_tokens = {str(token) for token in added if is_cutting(token)}
        self._parts: dict[str, list[int]] = {}  # the ids of parts of earlier texts

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without any token added."""
        parts = self._cut(text)
        if len(parts) == 1:
            return self._encode(text)
        return list(chain.from_iterable(map(self._encode_part, parts)))

    def _encode_part(self, part: str) -> list[int]:
        if part not in self._parts:
            if len(self._parts) == MAX_PARTS:
                self._parts.clear()
            self._parts[part] = self._encode(part)
        return self._parts[part]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        if self.fast_backend is None or any(MARK in text or len(self._cut(text)) > 1 for text in texts):
            return [self.encode(text) for text in texts]
        return self._encode_plain(texts)

    def continue_ids(self, prompt: list[int], whole: list[int], rest: str) -> tuple[list[int], bool]:
        """The ids that follow the prompt's, and whether a token of the whole text spans the border."""
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :], False
        for before, start in self._beginnings.items():
            ids = self.encode(before + rest)
            if start and ids[: len(start)] == start:
                return ids[len(start) :], True
        return self.encode(rest), True

    @cached_property
    def _beginnings(self) -> dict[str, list[int]]:
        """Texts that may stand before the rest of a text, with their ids."""
        return {before: self.encode(before) for before in ("\n", "a", "0", ".")}

    def put_prefix(self, ids: list[int]) -> list[int]:
        """The ids after `prefix_ids`."""
        prefix = self.prefix_ids
        return ids if prefix and ids[: len(prefix)] == prefix else [*prefix, *ids]

    @cached_property
    def prefix_ids(self) -> list[int]:
        """What the tokenizer puts in front of a text, such as a BOS."""
        plain, whole = (
            list(self.tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (False, True)
        )
        starts = range(len(whole) - len(plain) + 1)
        start = next((k for k in starts if whole[k : k + len(plain)] == plain), 0)
        return whole[:start]

    def _cut(self, text: str) -> list[str]:
        """The text, cut in front of tokens at which the tokenizer splits it."""
        matches = self.token_pattern.finditer(text)
        cuts = [match.start() for match in matches if match[0] in self.cutting_tokens and match.start()]
        return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]

    def _encode(self, text: str) -> list[int]:
        if MARK not in text:
            return self._encode_plain([text])[0]
        if self.backend is None:
            self._copy_backend()
        respelled = self.special_pattern.sub(lambda match: self.spellings[match[0]], text).replace(MARK, "")
        ids = self.backend.encode(respelled, add_special_tokens=False).ids
        if not self.control_ids.isdisjoint(ids):
            raise ValueError(_NOT_AS_TEXT)
        return [self.special_ids.get(id_, id_) for id_ in ids]

    def _encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts without marks, as the tokenizer's own call gives them."""
        backend = self.fast_backend
        if backend is None:
            return [
                list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
                for text in texts
            ]
        # what earlier calls of the tokenizer have left behind
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        splits_specials = bool(getattr(self.tokenizer, "split_special_tokens", False))
        if backend.encode_special_tokens != splits_specials:
            backend.encode_special_tokens = splits_specials
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)  # without offsets
        return [encoding.ids for encoding in encodings]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text all of which is text, and the range [start, end) of characters of each."""
        if self.backend is None:
            if not hasattr(self.tokenizer, "backend_tokenizer"):
                raise ValueError(_NO_OFFSETS)
            self._copy_backend()
        encoding = self.backend.encode(text, add_special_tokens=False)
        if not (self.control_ids | self.special_ids.keys()).isdisjoint(encoding.ids):
            raise ValueError(_NOT_AS_TEXT)
        return encoding.ids, encoding.offsets

    def _copy_backend(self) -> None:
        """Give each control token a spelling of its own, and let the usual one be text."""
        from tokenizers import AddedToken, Tokenizer

        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or not hasattr(backend, "encode_special_tokens"):
            raise ValueError(_NOT_AS_TEXT)
        parts = json.loads(backend.to_str())
        parts["truncation"] = parts["padding"] = None
        parts["post_processor"] = None  # which would take blanks from the offsets of a token
        for part in parts["added_tokens"]:
            part["special"] = part["special"] or self.special_pattern.fullmatch(part["content"]) is not None
        if parts["model"]["type"] == "Unigram":  # it would find the tokens again, as pieces of the best score
            pieces = parts["model"]["vocab"]
            lowest = min(score for _, score in pieces) - 1e4
            parts["model"]["vocab"] = [
                [piece, lowest if self.special_pattern.fullmatch(piece) else score] for piece, score in pieces
            ]
        self.backend = Tokenizer.from_str(json.dumps(parts))
        self.backend.encode_special_tokens = True  # that is, as text
        for number, (id_, token) in enumerate(self.tokenizer.added_tokens_decoder.items()):
            if self.special_pattern.fullmatch(str(token)):
                spelling = f"{_QUOTE}{number}{_QUOTE}"
                self.spellings[str(token)] = spelling
                options = {
                    "lstrip": token.lstrip,
                    "rstrip": token.rstrip,
                    "normalized": False,
                    "special": False,
                }
                self.backend.add_tokens([AddedToken(spelling, **options)])
                self.special_ids[self.backend.token_to_id(spelling)] = id_
        # Unknown characters are the unknown token.
        self.control_ids = {*self.special_ids.values()} - {self.tokenizer.unk_token_id}


def find_fast_backend(tokenizer: Any) -> Any:
    """What a fast tokenizer of transformers calls; None for others, whose classes may do more to a text."""
    is_own = type(tokenizer).__module__.startswith("transformers.")
    return getattr(tokenizer, "backend_tokenizer", None) if is_own else None


def is_cutting(token: Any) -> bool:
    """Whether a tokenizer splits any text in front of an added token, which changes nothing before it."""
    return not (token.normalized or token.lstrip or token.single_word)
