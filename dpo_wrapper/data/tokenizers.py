"""Text -> token ids: by Hugging Face tokenizers, or as bytes, which needs no training and no download."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol

from dpo_wrapper.data.chat import Message, Turns

_BYTES_FILE = "byte_tokenizer.json"
_TEXT_ROLES = {"system": "System", "user": "Human", "assistant": "Assistant", "tool": "Tool"}


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

    def prompt_ids(self, prompt: str | Turns) -> list[int]:
        """The ids of a prompt: one BOS first if there is one; a dialogue ends by opening the answer."""

    def completion_ids(self, prompt: str | Turns, completion: str) -> list[int]:
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

    def prompt_ids(self, prompt: str | Turns) -> list[int]:
        if isinstance(prompt, str):
            return [self.bos_id, *self.encode(prompt)]
        turns = [token for turn in prompt for token in (self.role_ids[turn.role], *self.encode(turn.content))]
        return [self.bos_id, *turns, self.role_ids["assistant"]]

    def completion_ids(self, prompt: str | Turns, completion: str) -> list[int]:
        return [*self.encode(completion), self.eos_id]

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / _BYTES_FILE).write_text(json.dumps(self._identity(), indent=2) + "\n")

    def _identity(self) -> dict[str, object]:
        specials = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id, **self.role_ids}
        return {"tokenizer": "dpo_wrapper bytes", "version": 1, "specials": specials}


class HuggingFaceTokenizer:
    r"""A Hugging Face tokenizer as a `Tokenizer`.

    Plain text: prompt and completion are tokenized separately, so that no token straddles the border between
    them. Dialogues: the chat template renders the prompt with its generation prompt, and the whole dialogue;
    the completion is what the whole dialogue has after the prompt. Without a template, dialogues are written
    as `\n\nHuman:` and `\n\nAssistant:` turns.

    Args:
        tokenizer: a tokenizer of transformers.

    Raises:
        ValueError: the tokenizer has no EOS token.
    """

    def __init__(self, tokenizer: Any) -> None:
        if getattr(tokenizer, "eos_token_id", None) is None:
            problem = f"the tokenizer should have an EOS token, but this {type(tokenizer).__name__} has none"
            raise ValueError(f"{problem}: set its eos_token to the token that ends an answer.")
        self.tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        self.bos_id: int | None = tokenizer.bos_token_id
        # A pad token that also stands for something else cannot tell padding from text.
        other_ids = (None, self.bos_id, self.eos_id, tokenizer.unk_token_id)
        self.pad_id: int = -100 if tokenizer.pad_token_id in other_ids else tokenizer.pad_token_id
        self.vocab_size: int = max(tokenizer.get_vocab().values()) + 1

    @classmethod
    def load(cls, name_or_folder: str | Path) -> "HuggingFaceTokenizer":
        """Load the tokenizer of a folder or of a model on the hub; ValueError if there is none."""
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            problem = "Hugging Face tokenizers need transformers"
            raise ImportError(f"{problem}: pip install 'dpo-wrapper[train]'.") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(name_or_folder))
        except Exception as error:  # OSError, ValueError, KeyError and more, by what is missing or broken
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            expected = "a folder that holds one or the name of a model on the hub"
            problem = f"the tokenizer should be {expected}, but '{name_or_folder}' is neither ({reason})"
            remedy = "save a tokenizer there with save_pretrained, check the name, or use 'bytes'"
            raise ValueError(f"{problem}: {remedy}.") from error
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        options = {"add_special_tokens": False, "split_special_tokens": False, "verbose": False}
        return list(self.tokenizer(text, **options)["input_ids"])

    def decode(self, ids: Iterable[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def prompt_ids(self, prompt: str | Turns) -> list[int]:
        ids = self.encode(prompt if isinstance(prompt, str) else self._prompt_text(prompt))
        # A text or a template may write the BOS itself.
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def completion_ids(self, prompt: str | Turns, completion: str) -> list[int]:
        answer = completion.removesuffix(self.tokenizer.eos_token)
        ids = self.encode(answer)
        eos = ("EOS", self.eos_id, self.tokenizer.eos_token)
        for name, id_, token in (eos, ("BOS", self.bos_id, self.tokenizer.bos_token)):
            if id_ in ids:
                problem = f"the completion should not hold the {name} token, but {token!r} is in it"
                raise ValueError(f"{problem}: remove it from the text.")
        if isinstance(prompt, str):
            return [*ids, self.eos_id]
        if not self.tokenizer.chat_template:
            return [*self.encode(f" {answer}" if answer else ""), self.eos_id]
        return self._templated_completion(prompt, answer)

    def _templated_completion(self, prompt: Turns, answer: str) -> list[int]:
        opening = self._prompt_text(prompt)
        dialogue = self._render((*prompt, Message("assistant", answer)), add_generation_prompt=False)
        if not dialogue.startswith(opening):
            expected = "render a dialogue that begins with its prompt and generation prompt"
            problem = f"the chat template should {expected}, but it does not"
            raise ValueError(f"{problem}: use another template or plain text rows.")
        rest = dialogue[len(opening) :]
        ids = self.encode(rest)
        end = ids.index(self.eos_id) if self.eos_id in ids else len(ids)
        # White space aside, the answer has to be there in full: some templates drop the reasoning in it.
        rendered = rest.split(self.tokenizer.eos_token)[0]
        if "".join(answer.split()) not in "".join(rendered.split()):
            problem = "the chat template should keep the answer whole, but a part of it is missing"
            raise ValueError(f"{problem}: use another template or plain text rows.")
        # After the EOS a template may begin the next turn (a line break): nothing to learn from.
        return [*ids[:end], self.eos_id]

    def _prompt_text(self, prompt: Turns) -> str:
        if self.tokenizer.chat_template:
            return self._render(prompt, add_generation_prompt=True)
        texts = [f"\n\n{_TEXT_ROLES[turn.role]}: {turn.content}" for turn in prompt]
        if prompt[0].role == "system":
            texts[0] = prompt[0].content
        return "".join([*texts, "\n\nAssistant:"])

    def _render(self, turns: Turns, *, add_generation_prompt: bool) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
            return str(self.tokenizer.apply_chat_template(messages, **options))
        except ImportError as error:
            raise ImportError("chat templates need jinja2: pip install 'dpo-wrapper[train]'.") from error
        except Exception as error:  # a template is a program: it may raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            roles = ", ".join(turn.role for turn in turns)
            problem = f"the chat template should take the roles {roles}, but it raises '{reason}'"
            raise ValueError(f"{problem}: change the roles or leave the row out.") from error

    def fingerprint(self) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            model = json.loads(backend.to_str())
            # Left behind by earlier calls, and overridden by every call here.
            model = {key: value for key, value in model.items() if key not in ("truncation", "padding")}
        else:
            model = {"class": type(self.tokenizer).__name__, "vocab": self.tokenizer.get_vocab()}
        specials = [self.bos_id, self.eos_id, self.pad_id]
        identity = {"model": model, "specials": specials, "template": self.tokenizer.chat_template}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(str(folder))


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer of a folder, or of a model on the hub; 'bytes' is a `ByteTokenizer`."""
    if str(name) == "bytes" or (Path(name) / _BYTES_FILE).is_file():
        return ByteTokenizer()
    return HuggingFaceTokenizer.load(name)
