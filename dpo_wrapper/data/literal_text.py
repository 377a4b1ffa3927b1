"""Text with marks -> token ids, in which only unmarked spellings of special tokens are those tokens."""

import json
from typing import Any

from dpo_wrapper.data.chat_template import MARK

_QUOTE = "\U0010fffc"  # begins and ends the other spelling of a special token

_NOT_AS_TEXT = (
    "special tokens that a text spells should stay text, but this tokenizer cannot read them as text: leave "
    "the row out, or use the fast form of the tokenizer."
)

_NO_OFFSETS = (
    "masked spans should have a fast tokenizer, which says where tokens stand in the text, but this one is "
    "slow: use the fast form of the tokenizer."
)


class LiteralEncoder:
    """Encodes text for a tokenizer of transformers, so that marked spellings of special tokens stay text."""

    def __init__(self, tokenizer: Any, special_pattern: Any) -> None:
        self.tokenizer = tokenizer
        self.special_pattern = special_pattern
        self.backend: Any = None  # a copy of the tokenizer's own, with another spelling of each special token
        self.spellings: dict[str, str] = {}
        self.special_ids: dict[int, int] = {}
        self.control_ids: set[int] = set()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without any token added."""
        if MARK not in text:
            return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if self.backend is None:
            self._copy_backend()
        respelled = self.special_pattern.sub(lambda match: self.spellings[match[0]], text).replace(MARK, "")
        ids = self.backend.encode(respelled, add_special_tokens=False).ids
        if not self.control_ids.isdisjoint(ids):
            raise ValueError(_NOT_AS_TEXT)
        return [self.special_ids.get(id_, id_) for id_ in ids]

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
