"""Text -> token ids: by Hugging Face tokenizers, or as bytes, which needs no training and no download."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

from dpo_wrapper.data.rows.messages import Message, Turns, answer_turns
from dpo_wrapper.data.tokens.encoded import EncodedExample, Score, mask_tokens
from dpo_wrapper.data.tokens.hugging_face_tokenizer import HuggingFaceTokenizer

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

    @property
    def end_of_turn_id(self) -> int:
        """The token that ends an answer to a dialogue."""

    @property
    def has_chat_template(self) -> bool:
        """Whether a chat template writes dialogues."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without any token added."""

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids."""

    def is_template_text(self, prompt: str) -> bool:
        """Whether a plain prompt is a dialogue that a chat template has written already."""

    def encode_prompt(self, prompt: str | Turns, tools: Sequence[Any] = ()) -> list[int]:
        """The ids of a prompt as a model sees them when it is used; a dialogue ends by opening the answer."""

    def encode_example(
        self,
        prompt: str | Turns,
        completions: Sequence[str | Turns],
        tools: Sequence[Any] = (),
        score: Score = "last",
    ) -> EncodedExample:
        """The ids of a prompt and of the completions that continue it, each with one end of turn."""

    def encode_text(self, text: str, masked_spans: Sequence[tuple[int, int]] = ()) -> EncodedExample:
        """The ids of a text as the completion of what stands in front of every text, with an EOS at its end.

        Tokens with a character in one of the masked spans, [start, end) in characters, are not scored; the
        EOS is not if the last character is masked.
        """

    def fingerprint(self) -> str:
        """A sha256 over all that determines the ids, the same in every process."""

    def template_fingerprint(self) -> str:
        """A sha256 over the chat template, if any, and what it is called with, but for the date."""

    def save(self, folder: str | Path) -> None:
        """Write what `load_tokenizer(folder)` reads."""


class ByteTokenizer:
    """UTF-8 bytes as tokens, and one token each for BOS, EOS, PAD and the roles of a dialogue.

    Any Unicode text comes back unchanged. No text can spell a special token.

        plain      BOS b y t e s                          | c o m p l e t i o n EOS
        dialogue   BOS USER b y t e s ... ASSISTANT       | c o m p l e t i o n EOS
    """

    vocab_size: int = 263
    bos_id: int = 256
    eos_id: int = 257
    end_of_turn_id: int = 257
    pad_id: int = 258
    role_ids: ClassVar = {"system": 259, "developer": 259, "user": 260, "assistant": 261, "tool": 262}
    has_chat_template: bool = False

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        names = {self.bos_id: "<bos>", self.eos_id: "<eos>", self.pad_id: "<pad>"}
        names |= {id_: f"<{role}>" for role, id_ in self.role_ids.items() if role != "developer"}
        names = {} if skip_special_tokens else names
        # a model may have more ids than there are, and padding none
        parts = (bytes([id_]) if 0 <= id_ < 256 else names.get(id_, "").encode() for id_ in ids)
        return b"".join(parts).decode("utf-8", errors="replace")

    def is_template_text(self, prompt: str) -> bool:
        return False

    def encode_prompt(self, prompt: str | Turns, tools: Sequence[Any] = ()) -> list[int]:
        if isinstance(prompt, str):
            return [self.bos_id, *self.encode(prompt)]
        ids = self._encode_turns(prompt, tools)
        return [self.bos_id, *(ids if prompt[-1].role == "assistant" else [*ids, self.role_ids["assistant"]])]

    def encode_example(
        self,
        prompt: str | Turns,
        completions: Sequence[str | Turns],
        tools: Sequence[Any] = (),
        score: Score = "last",
    ) -> EncodedExample:
        ids = self.encode_prompt(prompt, tools)
        parts = [self._encode_completion(completion) for completion in completions]
        if score == "last" and all(len(answer_turns(completion)) == 1 for completion in completions):
            return EncodedExample(ids, parts)
        scored = [self._find_scored([*ids, *part], len(ids) if score == "last" else 0) for part in parts]
        return EncodedExample(ids, parts, scored)

    def encode_text(self, text: str, masked_spans: Sequence[tuple[int, int]] = ()) -> EncodedExample:
        prompt, ids = self.encode_prompt(""), [*self.encode(text), self.eos_id]
        if not masked_spans:
            return EncodedExample(prompt, [ids])
        offsets = [(k, k + 1) for k, character in enumerate(text) for _ in character.encode()]
        scored = [False] * len(prompt) + mask_tokens(len(text), offsets, masked_spans)
        return EncodedExample(prompt, [ids], [scored])

    def _encode_completion(self, completion: str | Turns) -> list[int]:
        first, *others = answer_turns(completion)
        return [*self._encode_turns((first,))[1:], *self._encode_turns(others), self.eos_id]

    def _find_scored(self, sequence: list[int], start: int) -> list[bool]:
        """True on the assistant's words from `start` on, and on the token that ends each of its turns."""
        role, scored = self.role_ids["assistant"] if start else None, [False] * start
        for id_ in sequence[start:]:
            scored.append(role == self.role_ids["assistant"])
            role = id_ if id_ in self.role_ids.values() else role
        return scored

    def _encode_turns(self, turns: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        if tools or any(turn.needs_template for turn in turns):
            raise ValueError(
                "tools, tool calls and reasoning should have a chat template, but bytes have none: name "
                "a Hugging Face tokenizer, or leave the row out."
            )
        return [id_ for turn in turns for id_ in (self.role_ids[turn.role], *self.encode(turn.text))]

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()

    def template_fingerprint(self) -> str:
        return hashlib.sha256(b"").hexdigest()

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / _BYTES_FILE).write_text(json.dumps(self._identity(), indent=2) + "\n")

    def _identity(self) -> dict[str, object]:
        specials = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id, **self.role_ids}
        return {"tokenizer": "dpo_wrapper bytes", "version": 1, "specials": specials}


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    return any((Path(folder) / name).is_file() for name in (_BYTES_FILE, "tokenizer_config.json"))


def as_tokenizer(tokenizer: Any) -> Tokenizer:
    """A `Tokenizer` for a tokenizer of transformers, or for what `load_tokenizer` takes; None is 'bytes'.

    Raises:
        TypeError: it is none of these.
    """
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        return load_tokenizer(tokenizer or "bytes")
    if hasattr(tokenizer, "encode_example"):
        return cast(Tokenizer, tokenizer)
    if not hasattr(tokenizer, "eos_token_id"):
        expected = "the tokenizer should be one of transformers, the name or folder of one, or 'bytes'"
        raise TypeError(f"{expected}, but it is {type(tokenizer).__name__}: give one of these.")
    return HuggingFaceTokenizer(tokenizer)


def load_tokenizer(name: str | Path, **options: Any) -> Tokenizer:
    """The tokenizer of a folder, or of a model on the hub; 'bytes' is a `ByteTokenizer`.

    Options are those of `HuggingFaceTokenizer`; ValueError where bytes have no use for them.
    """
    if str(name) == "bytes" or (Path(name) / _BYTES_FILE).is_file():
        if given := [name for name, value in options.items() if value is not None and name != "today"]:
            raise ValueError(f"{given[0]} needs a Hugging Face tokenizer, but bytes are used: leave it out.")
        return ByteTokenizer()
    return HuggingFaceTokenizer.load(name, **options)
