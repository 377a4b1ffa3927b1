"""The forms of a prompt and its completions: plain texts, and dialogues."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_wrapper.data.chat import (
    Message,
    Turns,
    has_turns,
    is_dialogue,
    is_open_dialogue,
    join_turns,
    parse_dialogue,
    parse_messages,
)
from dpo_wrapper.data.errors import ExampleError, describe_value, missing_field_error


def is_blank(value: Any) -> bool:
    return value is None or not (value.strip() if isinstance(value, str) else value)


@dataclass(frozen=True)
class Prompt:
    """The prompt's field in a record and its value, both None if the record has no such field."""

    record: Mapping[Any, Any]
    field: str | None = None
    value: Any = None

    @property
    def is_blank(self) -> bool:
        return is_blank(self.value)

    def as_turns(self) -> Turns:
        """The prompt as turns; the opening of the answer at the end of a dialogue text is no turn."""
        if not isinstance(self.value, str):
            return parse_messages(self.value, str(self.field))
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
            start = (equal.index(False) if False in equal else len(equal)) + 1
            lengths = f"{len(turns)} turns instead of {len(shared)}"
            raise ExampleError(
                f"the turns before the last answer should be those of field '{first}', but they differ from "
                f"turn {start} on ({lengths}): let all completions answer one prompt or leave the row out.",
                field,
            )
    _check_prompt(shared, first if prompt.is_blank else prompt.field)
    return shared, tuple(turns[-1].content for turns in dialogues.values())


def _check_all_have_turns(texts: dict[str, str], prompt: Prompt) -> None:
    """Completions without a prompt hold it themselves, as dialogues; ExampleError if they do not."""
    plain = [field for field, text in texts.items() if not has_turns(text)]
    if len(plain) == len(texts) and prompt.field is None:
        raise missing_field_error(prompt.record, "prompt", "add 'prompt' or say which field holds the prompt")
    if len(plain) == len(texts):
        problem = f"the prompt should not be empty, but it is {describe_value(prompt.value)}"
        raise ExampleError(f"{problem}: fill it in or leave the row out.", prompt.field)
    if plain:
        other = next(field for field in texts if field not in plain)
        raise ExampleError(
            f"the completion should be a dialogue with '\\n\\nAssistant:' turns as in field '{other}', but "
            "it is text without turns: write all completions in one form or add a prompt.",
            plain[0],
        )


def _check_prompt(prompt: Turns, field: str | None) -> None:
    if not prompt:
        problem = "a turn should stand before the answer, but the answer stands alone"
        raise ExampleError(f"{problem}: add the prompt or leave the row out.", field)
    if prompt[-1].role == "assistant":
        problem = "the last turn of the prompt should not be the assistant's, but it is an assistant turn"
        raise ExampleError(f"{problem}: leave the answers to the completions, or leave the row out.", field)
