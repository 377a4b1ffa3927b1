"""Messages of a dialogue, and the forms in which files write them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dpo_wrapper.data.errors import ExampleError, describe_value

SYSTEM_ROLES = ("system", "developer")
ROLES = (*SYSTEM_ROLES, "user", "assistant", "tool")

# ShareGPT and similar data sets have other names for these roles.
_ROLE_ALIASES = dict.fromkeys(("gpt", "chatgpt", "chatbot", "model", "bot", "ai"), "assistant")
_ROLE_ALIASES |= dict.fromkeys(("human", "prompter"), "user")
_ROLE_ALIASES |= dict.fromkeys(("function", "observation", "tool_response", "ipython"), "tool")
_CALL_ROLES = ("function_call", "tool_call")  # an assistant's turn whose text is a call in JSON

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue.

    Attributes:
        role: one of `ROLES`.
        content: its text; None for an assistant's turn that only calls tools.
        extras: what else a chat template may read, such as `tool_calls`, `tool_call_id`, `name` or
            `reasoning_content`.
    """

    role: str
    content: str | None
    extras: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(_role_problem(self.role))

    @property
    def text(self) -> str:
        """Its text, empty where there is none."""
        return self.content or ""

    @property
    def needs_template(self) -> bool:
        """Whether it says more than its text, which only a chat template can write."""
        return any(self.extras.get(key) for key in ("tool_calls", *REASONING_KEYS))

    @property
    def identity(self) -> tuple[str, str, Any]:
        """What makes two messages the same: role, text and calls, but no ids and no white space around."""
        return self.role, self.text.strip(), self.extras.get("tool_calls")

    def as_dict(self) -> dict[str, Any]:
        """The message as a chat template reads it."""
        return {"role": self.role, "content": self.content, **self.extras}


Turns = tuple[Message, ...]


def answer_turns(completion: str | Turns) -> Turns:
    """A completion of a dialogue as turns."""
    return (Message("assistant", completion),) if isinstance(completion, str) else completion


def split_system(turns: Turns) -> tuple[Turns, Turns]:
    """The system messages at the beginning, and the other turns."""
    count = next((k for k, turn in enumerate(turns) if turn.role not in SYSTEM_ROLES), len(turns))
    return turns[:count], turns[count:]


def join_answer(prompt: Turns, answer: Turns) -> Turns:
    """A dialogue with its answer, which goes on where a prompt ends in the assistant's turn."""
    if prompt[-1].role != "assistant":
        return (*prompt, *answer)
    content, extras = prompt[-1].text + answer[0].text, {**prompt[-1].extras, **answer[0].extras}
    joined = replace(answer[0], content=content, extras=extras)
    return (*prompt[:-1], joined, *answer[1:])


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
    role = values.pop("role", values.pop("from", None))
    content: Any = values.pop("content", values.pop("value", None))
    if isinstance(content, (list, tuple)):
        content = _join_parts(content, field, number)
    name = role.strip().lower() if isinstance(role, str) else None
    if "function_call" in values:  # OpenAI's older form of one call
        values.setdefault("tool_calls", [{"type": "function", "function": values.pop("function_call")}])
    calls = values.pop("tool_calls", None)
    if calls := json_or_text(calls):
        values["tool_calls"] = _check_calls(calls, name, field, number)
    for key in REASONING_KEYS:
        if not isinstance(values.get(key, ""), str):
            received = describe_value(values[key])
            sentence = f"the {key} should be text, but it is {received}: write it as text or leave it out."
            raise ExampleError(sentence, field, number)
    is_call = name in _CALL_ROLES and isinstance(content, str)
    if is_call:
        values["tool_calls"] = _parse_calls(content, field, number)
        name = "assistant"
    content = None if is_call else content
    problem = None
    if not isinstance(item, Mapping):
        problem = f"is {describe_value(item)}: write every message as such an object"
    elif role is None:
        problem = f"is {describe_value(item)} without a role: add the role"
    elif content is None and "tool_calls" not in values:
        problem = "has no content: add the text or leave the row out"
    elif content is not None and not isinstance(content, str):
        problem = f"has {describe_value(content)} as its content: write the content as plain text"
    if problem:
        form = "an object with 'role' and 'content' (or 'from' and 'value')"
        raise ExampleError(f"a message should be {form}, but it {problem}.", field, number)
    name = _ROLE_ALIASES.get(name or "", name)
    if name not in ROLES:
        raise ExampleError(_role_problem(role), field, number)
    for text in iterate_texts([content, values]):
        check_unicode(text, field, number)
    return Message(name, content, values)


def _join_parts(parts: Sequence[Any], field: str, number: int) -> str:
    """The text of content that is written as parts, as APIs that also take images do."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text", part.get("content")) if isinstance(part, Mapping) else part
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            what = f"a part of type {kind!r}" if isinstance(part, Mapping) else describe_value(part)
            problem = f"a message should hold text, but it holds {what}, which is not read as text"
            remedy = "write the content as plain text or leave the row out"
            raise ExampleError(f"{problem}: {remedy}.", field, number)
        texts.append(text)
    return "".join(texts)


def json_or_text(value: Any) -> Any:
    """The value of a JSON text; any other value as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def parse_messages_text(value: Any) -> Any:
    """Messages that are written as JSON text, as in a CSV file; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    parsed = json_or_text(value)
    is_list = isinstance(parsed, list) and all(isinstance(item, Mapping) for item in parsed)
    return parsed if is_list and all({"role", "from"} & item.keys() for item in parsed) else value


def _check_calls(calls: Any, role: str | None, field: str, number: int) -> list[Any]:
    """The tool calls of a message; ExampleError unless they are the assistant's and name their functions."""
    items = calls if isinstance(calls, (list, tuple)) else [calls]
    problem = None
    if _ROLE_ALIASES.get(role or "", role) != "assistant":
        problem = f"tool calls should be the assistant's, but they are in a {role} turn: move or remove them"
    for item in items:
        function = item.get("function", item) if isinstance(item, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            form = "an object with a function's name and arguments"
            problem = f"a tool call should be {form}, but it is {describe_value(item)}: write it so"
    if problem is not None:
        raise ExampleError(f"{problem}.", field, number)
    return list(items)


def _parse_calls(content: str, field: str, number: int) -> list[dict[str, Any]]:
    try:
        parsed = json.loads(content)
        calls = parsed if isinstance(parsed, list) else [parsed]
        return [
            {"type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}} for c in calls
        ]
    except (ValueError, KeyError, TypeError) as error:
        form = "JSON with 'name' and 'arguments'"
        problem = f"the text of a call should be {form}, but it is {describe_value(content)}"
        raise ExampleError(
            f"{problem}: write it so, or rename the role to assistant.", field, number
        ) from error


def iterate_texts(value: Any) -> list[str]:
    """All texts inside lists and objects."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for part in value.values() for text in iterate_texts(part)]
    return (
        [text for part in value for text in iterate_texts(part)] if isinstance(value, (list, tuple)) else []
    )
