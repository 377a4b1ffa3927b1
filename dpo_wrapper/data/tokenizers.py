"""Text to token ids: what a tokenizer must do here, and one that needs no training and no download."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Protocol

from dpo_wrapper.data.chat import Message
from dpo_wrapper.data.hugging_face_tokenizer import HuggingFaceTokenizer

__all__ = ["ByteTokenizer", "HuggingFaceTokenizer", "Tokenizer", "load_tokenizer"]

_BYTES_FILE = "byte_tokenizer.json"


class Tokenizer(Protocol):
    """What `dpo_wrapper.data` needs of a tokenizer.

    Errors in a text are ValueErrors without a place; `tokenize_examples` adds it.
    """

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def pad_id(self) -> int:
        """A filler that never reaches the model; never BOS or EOS, but -100 where no other one exists."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without any token added."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens skipped."""

    def prompt_ids(self, prompt: str | tuple[Message, ...]) -> list[int]:
        """The ids of a prompt: one BOS first if there is one; a dialogue ends by opening the answer."""

    def completion_ids(self, prompt: str | tuple[Message, ...], completion: str) -> list[int]:
        """The ids that follow `prompt_ids(prompt)` in this completion; they end in exactly one EOS."""

    def fingerprint(self) -> str:
        """A sha256 over all that determines the ids, the same in every process."""

    def save(self, folder: str | Path) -> None:
        """Write what `load_tokenizer(folder)` reads."""


class ByteTokenizer:
    """UTF-8 bytes as tokens, and one token each for BOS, EOS, PAD and the four roles of a dialogue.

    Any Unicode text comes back unchanged. No text can spell a special token.

        plain      BOS b y t e s                          | c o m p l e t i o n EOS
        dialogue   BOS USER b y t e s ... ASSISTANT       | c o m p l e t i o n EOS
    """

    vocab_size: int = 263
    bos_id: int = 256
    eos_id: int = 257
    pad_id: int = 258
    role_ids: ClassVar[dict[str, int]] = {"system": 259, "user": 260, "assistant": 261, "tool": 262}

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(token for token in ids if 0 <= token < 256).decode("utf-8", errors="replace")

    def prompt_ids(self, prompt: str | tuple[Message, ...]) -> list[int]:
        if isinstance(prompt, str):
            return [self.bos_id, *self.encode(prompt)]
        turns = [token for turn in prompt for token in (self.role_ids[turn.role], *self.encode(turn.content))]
        return [self.bos_id, *turns, self.role_ids["assistant"]]

    def completion_ids(self, prompt: str | tuple[Message, ...], completion: str) -> list[int]:
        return [*self.encode(completion), self.eos_id]

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / _BYTES_FILE).write_text(json.dumps(self._identity(), indent=2) + "\n")

    def _identity(self) -> dict[str, object]:
        specials = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id, **self.role_ids}
        return {"tokenizer": "dpo_wrapper bytes", "version": 1, "specials": specials}


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Load a tokenizer.

    Args:
        name: 'bytes' or a folder that a `ByteTokenizer` was saved in; else the folder or the name of a
            Hugging Face tokenizer.

    Raises:
        ValueError: the folder holds no tokenizer, or the name cannot be fetched.
    """
    if str(name) == "bytes" or (Path(name) / _BYTES_FILE).is_file():
        return ByteTokenizer()
    return HuggingFaceTokenizer.load(name)
