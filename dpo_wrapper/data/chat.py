"""The forms of a prompt and its completions: plain texts, and dialogues as messages or as one text."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_wrapper.data.errors import ExampleError, describe_value, missing_field_error

ROLES = ("system", "user", "assistant", "tool")

# ShareGPT and similar data sets have other names for these roles.
_ROLE_ALIASES = {"human": "user", "function": "tool", "observation": "tool"}
_ROLE_ALIASES |= dict.fromkeys(("gpt", "chatgpt", "model"), "assistant")

_TURN = re.compile(r"\n\n(Human|Assistant):")
_TEXT_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(_role_problem(self.role))


Turns = tuple[Message, ...]


def _role_problem(role: Any) -> str:
    return f"the role should be one of {', '.join(ROLES)}, but it is {describe_value(role)}: rename the role."


def check_unicode(text: str, field: str, message: int = 0) -> str:
    """Return `text`; ExampleError for half of a surrogate pair: JSON can spell it, no tokenizer reads it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}, half of a surrogate pair"
        problem = f"the text should be Unicode, but character {error.start + 1} is {half}"
        raise ExampleError(f"{problem}: remove or replace it.", field, message) from None
    return text


def parse_messages(value: Any, field: str) -> Turns:
    """The messages of a list of {role, content} or {from, value} objects, or of one such object."""
    items = value if isinstance(value, (list, tuple)) else [value]
    if not items:
        raise ExampleError("there should be at least one message, but the list is empty: add some.", field)
    return tuple(_parse_message(item, field, number) for number, item in enumerate(items, 1))


def _parse_message(item: Any, field: str, number: int) -> Message:
    # Parquet fills the keys that a message does not have with nulls, so null counts as absent.
    pairs = item.items() if isinstance(item, Mapping) else ()
    values = {key: value for key, value in pairs if value is not None}
    role: Any = values.get("role", values.get("from"))
    content: Any = values.get("content", values.get("value"))
    problem = None
    if not isinstance(item, Mapping):
        problem = f"is {describe_value(item)}: write every message as such an object"
    elif role is None:
        problem = f"is {describe_value(item)} without a role: add the role"
    elif content is None:
        problem = "has no content: add the text or leave the row out"
    elif not isinstance(content, str):
        problem = f"has {describe_value(content)} as its content: write the content as plain text"
    if problem:
        form = "an object with 'role' and 'content' (or 'from' and 'value')"
        raise ExampleError(f"a message should be {form}, but it {problem}.", field, number)
    name = _ROLE_ALIASES.get(role.lower(), role.lower()) if isinstance(role, str) else None
    if name not in ROLES:
        raise ExampleError(_role_problem(role), field, number)
    return Message(name, check_unicode(content, field, number))


def parse_dialogue(text: str) -> Turns:
    r"""The turns of a dialogue that is written as one text.

    Turns begin with `\n\nHuman:` or `\n\nAssistant:`; the first may lack the blank lines. Contents are
    stripped of surrounding white space. Text before the first turn is a system message. Successive turns of
    one speaker (hh-rlhf has them) become one turn, its parts a blank line apart.
    """
    preamble, *parts = _TURN.split("\n\n" + text.strip())
    turns = [Message("system", preamble.strip())] if preamble.strip() else []
    for name, content in zip(parts[::2], (part.strip() for part in parts[1::2]), strict=True):
        if turns and turns[-1].role == _TEXT_ROLES[name]:
            content = "\n\n".join(filter(None, (turns.pop().content, content)))
        turns.append(Message(_TEXT_ROLES[name], content))
    return tuple(turns)


def is_dialogue(text: str, prompt: str) -> bool:
    """Whether the text is a dialogue with an answer, which begins as one or with the dialogue `prompt`."""
    text = text.strip()
    is_start = text.startswith("Human:") or (is_open_dialogue(prompt) and text.startswith(prompt.strip()))
    return is_start and "\n\nAssistant:" in text


def is_open_dialogue(text: str) -> bool:
    """Whether the text is a dialogue that ends where the assistant is about to speak."""
    text = "\n\n" + text.strip()
    return text.endswith("\n\nAssistant:") and "\n\nHuman:" in text


def join_turns(prompt: Turns, turns: Turns) -> Turns | None:
    """`prompt` followed by `turns`, without what `turns` repeats; None if the two contradict each other.

    White space around contents does not count in the comparison, nor does a system message that only one has.
    """
    if _strip_turns(turns[: len(prompt)]) == _strip_turns(prompt):
        return turns
    if len(prompt) == 1 and _strip_turns(prompt)[0] in _strip_turns(turns):
        return turns  # the prompt column repeats a later question of the dialogue
    prompt_system, questions = _split_system(prompt)
    system, others = _split_system(turns)
    if questions and _strip_turns(others[: len(questions)]) == _strip_turns(questions):
        return None if prompt_system and system else prompt_system + system + others
    if questions and others and questions[-1].role == others[0].role == "user":
        return None
    return prompt + turns


def _strip_turns(turns: Turns) -> list[tuple[str, str]]:
    return [(turn.role, turn.content.strip()) for turn in turns]


def _split_system(turns: Turns) -> tuple[Turns, Turns]:
    """The system messages at the beginning, and the other turns."""
    count = next((k for k, turn in enumerate(turns) if turn.role != "system"), len(turns))
    return turns[:count], turns[count:]


@dataclass(frozen=True)
class Prompt:
    """The prompt's field in a record and its value, '' and None if the record has no such field."""

    record: Mapping[Any, Any]
    field: str = ""
    value: Any = None

    @property
    def is_blank(self) -> bool:
        return not (self.value.strip() if isinstance(self.value, str) else self.value)

    def as_turns(self) -> Turns:
        """The prompt as turns; the opening of the answer at the end of a dialogue text is no turn."""
        if not isinstance(self.value, str):
            return parse_messages(self.value, self.field)
        if is_open_dialogue(self.value):
            return parse_dialogue(self.value.strip().removesuffix("Assistant:"))
        return (Message("user", self.value),)


def parse_texts(texts: dict[str, str], prompt: Prompt) -> tuple[str | Turns, tuple[str, ...]]:
    """Prompt and completions, from strings by field: completions alone, or whole dialogues as one text."""
    if prompt.is_blank:
        _check_all_have_turns(texts, prompt)
    text = prompt.value if isinstance(prompt.value, str) else ""
    if prompt.is_blank or all(is_dialogue(completion, text) for completion in texts.values()):
        return parse_dialogues({field: parse_dialogue(text) for field, text in texts.items()}, prompt)
    if text and not is_open_dialogue(text):
        return text, tuple(texts.values())
    turns = prompt.as_turns()
    _check_prompt(turns, prompt.field)
    return turns, tuple(completion.strip() if text else completion for completion in texts.values())


def parse_dialogues(dialogues: dict[str, Turns], prompt: Prompt) -> tuple[Turns, tuple[str, ...]]:
    """Prompt and completions, from turns by field: the last answer alone, or a dialogue that ends in it."""
    prompts: dict[str, Turns] = {}
    for field, turns in dialogues.items():
        if turns[-1].role != "assistant":
            problem = f"the dialogue should end in an assistant turn, but it ends in a {turns[-1].role} turn"
            raise ExampleError(f"{problem}: add the answer or leave the row out.", field)
        joined = turns[:-1] if prompt.is_blank else join_turns(prompt.as_turns(), turns[:-1])
        if joined is None:
            problem = f"the dialogue should answer or repeat field '{prompt.field}', but it begins otherwise"
            raise ExampleError(f"{problem}: correct one of the two or leave the row out.", field)
        prompts[field] = joined
    first, shared = next(iter(prompts.items()))
    for field, turns in prompts.items():
        if turns != shared:
            equal = [a == b for a, b in zip(turns, shared, strict=False)]
            start = [*equal, False].index(False) + 1
            problem = f"the turns before the last answer should be those of field '{first}', but they differ "
            problem += f"from turn {start} on ({len(turns)} turns instead of {len(shared)})"
            raise ExampleError(f"{problem}: let all answer one prompt or leave the row out.", field)
    _check_prompt(shared, first if prompt.is_blank else prompt.field)
    return shared, tuple(turns[-1].content for turns in dialogues.values())


def _check_all_have_turns(texts: dict[str, str], prompt: Prompt) -> None:
    """Completions without a prompt hold it themselves, as dialogues; ExampleError if they do not."""
    plain = [field for field, text in texts.items() if not _TURN.search("\n\n" + text.strip())]
    if len(plain) == len(texts) and not prompt.field:
        raise missing_field_error(prompt.record, "prompt", "add 'prompt' or say which field holds the prompt")
    if len(plain) == len(texts):
        problem = f"the prompt should not be empty, but it is {describe_value(prompt.value)}"
        raise ExampleError(f"{problem}: fill it in or leave the row out.", prompt.field)
    if plain:
        other = next(field for field in texts if field not in plain)
        form = f"a dialogue with '\\n\\nAssistant:' turns as in field '{other}'"
        problem = f"the completion should be {form}, but it is text without turns"
        raise ExampleError(f"{problem}: write all completions in one form or add a prompt.", plain[0])


def _check_prompt(prompt: Turns, field: str) -> None:
    if not prompt:
        raise ExampleError("a prompt should come first, but none does: add it or leave the row out.", field)
    if prompt[-1].role == "assistant":
        problem = "the last turn of the prompt should not be the assistant's, but it is an assistant turn"
        raise ExampleError(f"{problem}: leave the answers to the completions, or leave the row out.", field)
