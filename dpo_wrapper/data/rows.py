"""Rows of preference data in their one normal form: a prompt and two completions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .turns import (
    Message,
    RowError,
    check_text,
    describe,
    holds_turns,
    is_whole_dialogue,
    join,
    names,
    opens_answer,
    parse_messages,
    parse_text,
    row_error,
)

__all__ = ["Fields", "Message", "Row", "RowError", "normalize"]

PROMPT_FIELDS = ("prompt", "text", "conversations", "messages")

_SPLITS = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(
    ("test", "validation", "valid", "eval", "held-out", "heldout"), "test"
)

Turns = tuple[Message, ...]


@dataclass(frozen=True)
class Row:
    """One preference pair.

    prompt: plain text, or the turns of a dialogue, the last of which is not the assistant's.
    chosen, rejected: the two completions, text; in a dialogue the answers to its last turn. May be empty.
    split: 'train', 'test' (held out) or None where the data does not say.
    weight, margin: factor of the pair's loss, and nats by which chosen should win; None where not said.
    where: the place the row came from, e.g. 'prefs.jsonl, line 12'; starts every error message about it.
    """

    prompt: str | Turns
    chosen: str
    rejected: str
    split: str | None = None
    where: str = ""
    weight: float | None = None
    margin: float | None = None


@dataclass(frozen=True)
class Fields:
    """What the columns of a data set are called.

    prompt None finds the prompt among 'prompt', 'text', 'conversations' and 'messages', or takes it from the
    dialogues. A named prompt has to be there. ValueError for names that are empty, no strings, or alike.
    """

    prompt: str | None = None
    chosen: str = "chosen"
    rejected: str = "rejected"
    split: str = "split"
    weight: str = "weight"
    margin: str = "margin"

    def __post_init__(self) -> None:
        names = (self.prompt, self.chosen, self.rejected, self.split, self.weight, self.margin)
        given = [name for name in names if name is not None]
        if not all(isinstance(name, str) and name for name in given) or len(set(given)) < len(given):
            listed = ", ".join(describe(name) for name in given)
            raise ValueError(
                f"expected different, non-empty field names, got {listed}; name each column once"
            )


DEFAULT_FIELDS = Fields()


def normalize(record: Any, fields: Fields = DEFAULT_FIELDS, where: str = "") -> Row:
    r"""The Row that a record of any supported form stands for.

    The form is found from the types of the fields: plain strings; whole dialogues as one text with
    `\n\nHuman:` and `\n\nAssistant:` turns; lists of {role, content} messages; ShareGPT's {from, value}. In
    a dialogue the completion is always the last assistant turn, and what comes before it must be the same
    on both sides.

    RowError (a ValueError) for anything else: one sentence that starts with the place and the field.
    """
    if not isinstance(record, Mapping):
        wanted = "an object with the two sides of a pair"
        raise row_error(where, None, wanted, describe(record), "write one object per row")
    chosen, rejected = (_side(record, name, where) for name in (fields.chosen, fields.rejected))
    if isinstance(chosen, str) != isinstance(rejected, str):
        kinds = ("a string", "messages") if isinstance(chosen, str) else ("messages", "a string")
        wanted, remedy = f"{kinds[0]} as in field '{fields.chosen}'", "write both sides in one form"
        raise row_error(where, fields.rejected, wanted, kinds[1], remedy)
    source = _Source(fields, *_prompt_value(record, fields, where), where, names(record))
    if isinstance(chosen, str):
        prompt, answers = _from_texts(chosen, rejected, source)
    else:
        sides = ((fields.chosen, chosen), (fields.rejected, rejected))
        prompt, answers = _from_dialogues([parse_messages(side, where, name) for name, side in sides], source)
    split, weight = _split(record, fields, where), _number(record, fields.weight, where)
    if weight is not None and weight < 0:
        remedy = "write the better side as chosen, or leave the row out"
        raise row_error(where, fields.weight, "a weight that is not negative", describe(weight), remedy)
    return Row(prompt, *answers, split, where, weight, _number(record, fields.margin, where))


@dataclass(frozen=True)
class _Source:
    """What the forms below need to know of a record besides its two sides."""

    fields: Fields
    name: str | None  # of the prompt's field; None where the record has none
    value: Any
    where: str
    there: str  # the fields of the record, quoted

    @property
    def blank(self) -> bool:
        return _blank(self.value)

    def error(self, field: str | None, expected: str, got: str, remedy: str) -> RowError:
        return row_error(self.where, field, expected, got, remedy)


def _blank(value: Any) -> bool:
    return value is None or not (value.strip() if isinstance(value, str) else value)


def _side(record: Mapping[Any, Any], name: str, where: str) -> Any:
    if name not in record:
        got, remedy = f"a record with {names(record)}", "add it, or say which field holds this side"
        raise row_error(where, name, "this field", got, remedy)
    value = record[name]
    if isinstance(value, str):
        return check_text(value, where, name)
    if not isinstance(value, (list, tuple, Mapping)):
        wanted, remedy = "text or a list of messages", "fill it in or leave the row out"
        raise row_error(where, name, wanted, describe(value), remedy)
    return value


def _prompt_value(record: Mapping[Any, Any], fields: Fields, where: str) -> tuple[str | None, Any]:
    """The name and the value of the prompt's field; None and None where the record has none."""
    if fields.prompt is not None and fields.prompt not in record:
        got, remedy = f"a record with {names(record)}", "say which field holds the prompt"
        raise row_error(where, fields.prompt, "this field", got, remedy)
    present = [name for name in ([fields.prompt] if fields.prompt else PROMPT_FIELDS) if name in record]
    for name in present:
        value = record[name]
        if isinstance(value, str):
            check_text(value, where, name)
        elif value is not None and not isinstance(value, (list, tuple, Mapping)):
            wanted, remedy = "text or a list of messages", "write the prompt as text"
            raise row_error(where, name, wanted, describe(value), remedy)
        # Several forms in one Parquet file leave nulls in the columns of the others: look on.
        if not _blank(value):
            return name, value
    return (present[0], record[present[0]]) if present else (None, None)


def _split(record: Mapping[Any, Any], fields: Fields, where: str) -> str | None:
    value = record.get(fields.split)
    if value is None:
        return None
    known = _SPLITS.get(value.strip().lower()) if isinstance(value, str) else None
    if known is None:
        remedy = "rename it or leave the field out"
        raise row_error(where, fields.split, "'train' or 'test'", describe(value), remedy)
    return known


def _number(record: Mapping[Any, Any], name: str, where: str) -> float | None:
    """A column of numbers; None where the record has none."""
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
        raise row_error(where, name, "a finite number", describe(value), "correct it or rename the column")
    return float(value)


def _from_texts(chosen: str, rejected: str, source: _Source) -> tuple[str | Turns, tuple[str, str]]:
    """Both sides are strings: completions alone, or whole dialogues as one text."""
    fields = source.fields
    if source.blank:
        turned = [holds_turns(side) for side in (chosen, rejected)]
        if not any(turned) and source.name is None:
            got, remedy = f"a record with {source.there}", "add 'prompt' or say which field holds the prompt"
            raise source.error("prompt", "this field", got, remedy)
        if not any(turned):
            wanted, remedy = "a prompt that is not empty", "fill it in or leave the row out"
            raise source.error(source.name, wanted, describe(source.value), remedy)
        if not all(turned):
            field, other = (fields.rejected, fields.chosen)[:: 1 if turned[0] else -1]
            wanted = f"a dialogue with '\\n\\nAssistant:' turns as in field '{other}'"
            remedy = "write both sides in one form or add a prompt"
            raise source.error(field, wanted, "text without turns", remedy)
    given = source.value if isinstance(source.value, str) else ""
    if source.blank or (is_whole_dialogue(chosen, given) and is_whole_dialogue(rejected, given)):
        return _from_dialogues([parse_text(chosen), parse_text(rejected)], source)
    if isinstance(source.value, str) and not opens_answer(source.value):
        return source.value, (chosen, rejected)
    prompt = _check_prompt(_prompt_turns(source), source.name, source)
    if isinstance(source.value, str):
        return prompt, (chosen.strip(), rejected.strip())
    return prompt, (chosen, rejected)


def _from_dialogues(sides: list[Turns], source: _Source) -> tuple[Turns, tuple[str, str]]:
    """Both sides are turns: the last answer alone, or a dialogue that ends in it."""
    fields = source.fields
    prompts: list[Turns] = []
    for turns, field in zip(sides, (fields.chosen, fields.rejected), strict=True):
        if turns[-1].role != "assistant":
            wanted, got = "a dialogue that ends in an assistant turn", f"a {turns[-1].role} turn at its end"
            raise source.error(field, wanted, got, "add the answer or leave the row out")
        joined = turns[:-1] if source.blank else join(_prompt_turns(source), turns[:-1])
        if joined is None:
            wanted = f"the answer to field '{source.name}' or a dialogue that begins with it"
            remedy = "correct one of the two or leave the row out"
            raise source.error(field, wanted, "a dialogue that begins otherwise", remedy)
        prompts.append(joined)
    ours, theirs = prompts
    if ours != theirs:
        pairs = zip(ours, theirs, strict=False)
        differs = next((i for i, (a, b) in enumerate(pairs, 1) if a != b), min(len(ours), len(theirs)) + 1)
        wanted = f"the same turns before the last answer as in field '{fields.chosen}'"
        got = f"other ones from turn {differs} on (turns: {len(theirs)}, there: {len(ours)})"
        remedy = "let both sides answer one prompt or leave the row out"
        raise source.error(fields.rejected, wanted, got, remedy)
    _check_prompt(ours, fields.chosen if source.blank else source.name, source)
    return ours, (sides[0][-1].content, sides[1][-1].content)


def _prompt_turns(source: _Source) -> Turns:
    """The prompt's field as turns; the opening of the answer at the end of a dialogue text is no turn."""
    if not isinstance(source.value, str):
        return parse_messages(source.value, source.where, str(source.name))
    if opens_answer(source.value):
        return parse_text(source.value.strip().removesuffix("Assistant:"))
    return (Message("user", source.value),)


def _check_prompt(prompt: Turns, field: str | None, source: _Source) -> Turns:
    if not prompt:
        wanted, remedy = "a turn before the answer", "add the prompt or leave the row out"
        raise source.error(field, wanted, "the answer alone", remedy)
    if prompt[-1].role == "assistant":
        wanted = "a prompt that ends in a turn which is not the assistant's"
        remedy = "leave the answers to the two sides, or leave the row out"
        raise source.error(field, wanted, "an assistant turn at its end", remedy)
    return prompt
