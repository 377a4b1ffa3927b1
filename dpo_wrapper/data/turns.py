"""Dialogues: messages as objects, dialogues as one text, and the error that names a row's place."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")

# What other data sets call these roles (ShareGPT and its relatives).
_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
}

_TURN = re.compile(r"\n\n(Human|Assistant):")
_TEXT_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue. `role` is one of 'system', 'user', 'assistant', 'tool' (else ValueError)."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(
                f"expected a role out of {', '.join(ROLES)}, got {describe(self.role)}; rename the role"
            )


class RowError(ValueError):
    """A row that cannot be used; the message starts with its place: `prefs.jsonl, line 12, field ...`."""


def row_error(where: str, field: str | None, expected: str, got: str, remedy: str, turn: int = 0) -> RowError:
    """The RowError for a place; `turn` counts the messages of the field from 1, 0 for none of them."""
    parts = [where, f"field '{field}'" if field else "", f"message {turn}" if turn else ""]
    place = ", ".join(part for part in parts if part)
    problem = f"expected {expected}, got {got}; {remedy}"
    return RowError(f"{place}: {problem}" if place else problem)


def describe(value: Any) -> str:
    """A value in the words of an error message; long text is counted rather than quoted."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {value}" if abs(value) < 1e12 else "a number"
        case str():
            if not value:
                return "an empty string"
            return repr(value) if len(value) <= 40 else f"a string of {len(value)} characters"
        case list() | tuple():
            return f"a list of {len(value)}" if value else "an empty list"
        case Mapping():
            return f"an object with {names(value)}" if value else "an empty object"
        case _:
            return f"a value of type {type(value).__name__}"


def names(record: Mapping[Any, Any]) -> str:
    """The keys of a record, quoted, the first dozen of them; 'no fields' for an empty one."""
    keys = [f"'{key}'" for key in record]
    return ", ".join(keys[:12] + ["..."] * (len(keys) > 12)) or "no fields"


def check_text(text: str, where: str, field: str, turn: int = 0) -> str:
    """`text` itself; RowError for half of a surrogate pair, which JSON can spell and no tokenizer reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        got = f"\\u{ord(text[error.start]):04x} at character {error.start + 1}, half of a surrogate pair"
        raise row_error(where, field, "Unicode text", got, "remove or replace that character", turn) from None
    return text


def parse_messages(value: Any, where: str, field: str) -> tuple[Message, ...]:
    """Messages out of a list of {role, content} or {from, value} objects, or out of one such object.

    RowError with the number of the message for anything else, and for an empty list.
    """
    items = value if isinstance(value, (list, tuple)) else [value]
    if not items:
        raise row_error(where, field, "at least one message", "an empty list", "add the messages")
    return tuple(_parse_message(item, where, field, turn) for turn, item in enumerate(items, 1))


def _parse_message(item: Any, where: str, field: str, turn: int) -> Message:
    wanted = "an object with 'role' and 'content' (or 'from' and 'value')"
    if not isinstance(item, Mapping):
        remedy = "write every message as such an object"
        raise row_error(where, field, wanted, describe(item), remedy, turn)
    # Parquet fills keys that a row does not have with nulls, so null counts as absent.
    role = item.get("role") if item.get("role") is not None else item.get("from")
    content = item.get("content") if item.get("content") is not None else item.get("value")
    if role is None:
        raise row_error(where, field, wanted, f"{describe(item)} and no role", "add the role", turn)
    if content is None:
        remedy = "add the text or leave the row out"
        raise row_error(where, field, wanted, "a message without content", remedy, turn)
    if not isinstance(content, str):
        remedy = "write it as plain text"
        raise row_error(where, field, "content that is one string", describe(content), remedy, turn)
    known = _ALIASES.get(role.lower(), role.lower()) if isinstance(role, str) else None
    if known not in ROLES:
        wanted = f"a role out of {', '.join(ROLES)}"
        raise row_error(where, field, wanted, describe(role), "rename the role", turn)
    return Message(known, check_text(content, where, field, turn))


def parse_text(text: str) -> tuple[Message, ...]:
    r"""The turns of a dialogue written as one text.

    Turns open with `\n\nHuman:` or `\n\nAssistant:`; the blank lines may be absent before the first. Contents
    are stripped of surrounding white space. Text before the first turn is a system message. A speaker who
    goes on (`\n\nAssistant:` twice in a row, as hh-rlhf has it) has one turn, its parts a blank line apart.
    """
    preamble, *parts = _TURN.split("\n\n" + text.strip())
    turns = [Message("system", preamble.strip())] if preamble.strip() else []
    for role, content in zip(parts[::2], (part.strip() for part in parts[1::2]), strict=True):
        if turns and turns[-1].role == _TEXT_ROLES[role]:
            content = "\n\n".join(filter(None, (turns.pop().content, content)))
        turns.append(Message(_TEXT_ROLES[role], content))
    return tuple(turns)


def holds_turns(text: str) -> bool:
    """Whether a turn opens anywhere in the text."""
    return _TURN.search("\n\n" + text.strip()) is not None


def is_whole_dialogue(text: str, prompt: str) -> bool:
    """Whether the text is a dialogue rather than a completion.

    It is if it holds an answer and opens with a human turn, or with a prompt that is a dialogue itself.
    """
    text = text.strip()
    opens = text.startswith("Human:") or (opens_answer(prompt) and text.startswith(prompt.strip()))
    return opens and "\n\nAssistant:" in text


def opens_answer(text: str) -> bool:
    """Whether the text is a dialogue that ends where the assistant is about to speak."""
    text = "\n\n" + text.strip()
    return text.endswith("\n\nAssistant:") and "\n\nHuman:" in text


def join(prompt: tuple[Message, ...], turns: tuple[Message, ...]) -> tuple[Message, ...] | None:
    """`prompt` and then `turns`, without what `turns` repeats; None where the two contradict each other.

    White space around contents does not count in the comparison, nor does a system text that only one has.
    """
    if _keys(turns[: len(prompt)]) == _keys(prompt):
        return turns
    if len(prompt) == 1 and _keys(prompt)[0] in _keys(turns):
        return turns  # the prompt column repeats a later question of the dialogue
    system, asked = _system_apart(prompt)
    other_system, told = _system_apart(turns)
    if asked and _keys(told[: len(asked)]) == _keys(asked):
        return None if system and other_system else system + other_system + told
    if asked and told and asked[-1].role == told[0].role == "user":
        return None
    return prompt + turns


def _keys(turns: tuple[Message, ...]) -> list[tuple[str, str]]:
    return [(turn.role, turn.content.strip()) for turn in turns]


def _system_apart(turns: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    count = next((i for i, turn in enumerate(turns) if turn.role != "system"), len(turns))
    return turns[:count], turns[count:]
