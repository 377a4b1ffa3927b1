"""Prompts and completions: plain texts, dialogues as messages, and dialogues as one text."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from dpo_wrapper.data.errors import ExampleError, describe_value, missing_field_error
from dpo_wrapper.data.rows.messages import Message, Turns, parse_messages, split_system

_TURN = re.compile(r"\n\n(Human|Assistant):")
NO_PROMPT = "add 'prompt', name its column by --columns, or say that there is none by --columns prompt="
_TEXT_ROLES = {"Human": "user", "Assistant": "assistant"}

Completion = str | Turns
"""A plain text; in a dialogue the assistant's answer as text, or turns that begin and end with his."""


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
            content = "\n\n".join(filter(None, (turns.pop().text, content)))
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
    prompt_system, questions = split_system(prompt)
    system, others = split_system(turns)
    if questions and _strip_turns(others[: len(questions)]) == _strip_turns(questions):
        return None if prompt_system and system else prompt_system + system + others
    if questions and others and questions[-1].role == others[0].role == "user":
        return None
    return prompt + turns


def _strip_turns(turns: Turns) -> list[tuple[str, str, Any]]:
    return [turn.identity for turn in turns]


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


def parse_texts(
    texts: dict[str, str], prompt: Prompt, needs_prompt: bool = True
) -> tuple[str | Turns, tuple[Completion, ...]]:
    """Prompt and completions, from strings by field: completions alone, or whole dialogues as one text."""
    if not needs_prompt and not any(_TURN.search("\n\n" + text.strip()) for text in texts.values()):
        return "", tuple(texts.values())
    if prompt.is_blank:
        _check_all_have_turns(texts, prompt)
    text = prompt.value if isinstance(prompt.value, str) else ""
    if prompt.is_blank or all(is_dialogue(completion, text) for completion in texts.values()):
        return parse_dialogues({field: parse_dialogue(text) for field, text in texts.items()}, prompt)
    if text and not is_open_dialogue(text):
        return text, tuple(texts.values())
    turns = prompt.as_turns()
    if not isinstance(prompt.value, str):
        turns = _without_answer(turns, [(Message("assistant", text),) for text in texts.values()])
    _check_prompt(turns, prompt, prompt.field)
    return turns, tuple(completion.strip() if text else completion for completion in texts.values())


def parse_dialogues(dialogues: dict[str, Turns], prompt: Prompt) -> tuple[Turns, tuple[Completion, ...]]:
    """Prompt and completions, from turns by field: answers alone, or dialogues that end in them.

    The prompt is what all dialogues have in common before their last turns.
    """
    wholes = {
        field: _join_prompt(prompt, turns, field, list(dialogues.values()))
        for field, turns in dialogues.items()
    }
    first, whole = next(iter(wholes.items()))
    count = min(map(len, wholes.values())) - 1
    for field, other in wholes.items():
        equal = takewhile(
            lambda pair: pair[0] == pair[1], zip(_strip_turns(whole), _strip_turns(other), strict=False)
        )
        shared = min(sum(1 for _ in equal), count)
        if any(turns[shared].role != "assistant" for turns in (whole, other)):
            problem = f"the turns before the last answer should be those of field '{first}', but they differ "
            problem += f"from turn {shared + 1} on"
            if (num_turns := len(other) - 1) != len(whole) - 1:
                problem += f" ({num_turns} turn{'s' * (num_turns != 1)} instead of {len(whole) - 1})"
            raise ExampleError(f"{problem}: let all answer one prompt or leave the row out.", field)
        count = shared
    _check_prompt(whole[:count], prompt, first)
    return whole[:count], tuple(_as_completion(turns[count:]) for turns in wholes.values())


def _join_prompt(prompt: Prompt, turns: Turns, field: str, dialogues: list[Turns]) -> Turns:
    """A whole dialogue: the turns after a prompt that they do not repeat."""
    if turns[-1].role != "assistant":
        problem = f"the dialogue should end in an assistant turn, but it ends in a {turns[-1].role} turn"
        raise ExampleError(f"{problem}: add the answer or leave the row out.", field)
    given = () if prompt.is_blank else _without_answer(prompt.as_turns(), dialogues)
    if not given or _strip_turns(given) in map(_strip_turns, dialogues):
        return turns  # the column of the prompt may hold a whole dialogue
    if given[-1].role == "assistant" and turns[0].role == "assistant":
        return (*given, *turns)  # the answer has been begun
    joined = join_turns(given, turns[:-1])
    if joined is None:
        problem = f"the dialogue should answer or repeat field '{prompt.field}', but it begins otherwise"
        raise ExampleError(f"{problem}: correct one of the two or leave the row out.", field)
    return (*joined, turns[-1])


def _without_answer(prompt: Turns, answers: list[Turns]) -> Turns:
    """A prompt without its last turn if that is one of the answers (of a whole dialogue) or an empty one."""
    last = prompt[-1]
    is_empty = not last.text.strip() and not last.needs_template
    is_answer = is_empty or last.identity in [turns[0].identity for turns in answers]
    return prompt[:-1] if last.role == "assistant" and is_answer else prompt


def _as_completion(turns: Turns) -> Completion:
    return turns[0].text if len(turns) == 1 and not turns[0].extras else turns


def _check_all_have_turns(texts: dict[str, str], prompt: Prompt) -> None:
    """Completions without a prompt hold it themselves, as dialogues; ExampleError if they do not."""
    plain = [field for field, text in texts.items() if not _TURN.search("\n\n" + text.strip())]
    if len(plain) == len(texts) and not prompt.field:
        raise missing_field_error(prompt.record, "prompt", NO_PROMPT)
    if len(plain) == len(texts):
        problem = f"the prompt should not be empty, but it is {describe_value(prompt.value)}"
        raise ExampleError(f"{problem}: fill it in or leave the row out.", prompt.field)
    if plain:
        other = next(field for field in texts if field not in plain)
        form = f"a dialogue with '\\n\\nAssistant:' turns as in field '{other}'"
        problem = f"the completion should be {form}, but it is text without turns"
        raise ExampleError(f"{problem}: write all completions in one form or add a prompt.", plain[0])


def _check_prompt(turns: Turns, prompt: Prompt, field: str) -> None:
    """The prompt should not end in the assistant's turn, unless its column says how the answer begins."""
    field = field if prompt.is_blank else prompt.field
    if not turns:
        raise ExampleError("a prompt should come first, but none does: add it or leave the row out.", field)
    if turns[-1].role == "assistant" and (prompt.is_blank or isinstance(prompt.value, str)):
        problem = "the last turn of the prompt should not be the assistant's, but it is an assistant turn"
        raise ExampleError(f"{problem}: leave the answers to the completions, or leave the row out.", field)
