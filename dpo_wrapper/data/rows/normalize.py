"""A record of any form -> `Example`."""

from collections.abc import Mapping
from typing import Any

from dpo_wrapper.data.errors import ExampleError, describe_value, missing_field_error
from dpo_wrapper.data.examples import DEFAULT_FIELDS, Example, Fields, Kind
from dpo_wrapper.data.rows.comparison import Comparison
from dpo_wrapper.data.rows.dialogues import Completion, Prompt, parse_dialogues, parse_texts
from dpo_wrapper.data.rows.forms import COLUMNS, PROMPT_FIELDS
from dpo_wrapper.data.rows.messages import (
    Message,
    Turns,
    check_unicode,
    iterate_texts,
    parse_messages,
    parse_messages_text,
)
from dpo_wrapper.data.rows.row import Row
from dpo_wrapper.data.rows.supervised import find_form, parse_spans, parse_text, to_prompt_completion

MEDIA_FIELDS = ("images", "image", "videos", "video", "audios", "audio")
EXTRA_FIELDS = ("input", "system", "system_prompt", "history", "tools")


def needed_columns(fields: Fields) -> set[str]:
    """The columns that `to_example` may look up."""
    named = {part for name in vars(fields).values() if name for part in (name, name.split(".")[0])}
    return COLUMNS | named | {*PROMPT_FIELDS, *MEDIA_FIELDS, *EXTRA_FIELDS}


_SPLIT_WORDS = {"train": "train", "training": "train"}
_SPLIT_WORDS |= dict.fromkeys(
    ("test", "validation", "valid", "val", "dev", "eval", "held_out", "heldout"), "test"
)


def to_example(
    record: Any, fields: Fields = DEFAULT_FIELDS, source: str = "", kind: Kind = "preference"
) -> Example:
    r"""The example that a record of any supported form stands for.

    A preference has a prompt and one of:
        `chosen` and `rejected`: a pair (for other names of columns see `forms`);
        `completions`: a ranked list, the best first, or with scores or ranks;
        `completion` and `label` (true or false): one completion, desirable or not.
    A record of prompt_completion has:
        a prompt and a `completion`, or a dialogue that ends in the assistant's turn;
        or `text` with `loss_masking_spans`, ranges [start, end) of its characters that are not scored.
    A record of language_modeling has `text` alone.

    Prompt and completions are plain strings, whole dialogues as one text with `\n\nHuman:` and
    `\n\nAssistant:` turns, lists of {role, content} messages, or ShareGPT's {from, value}. In a dialogue the
    completion is the last assistant turn, or all turns from the first one in which the completions differ.

    `kind` says what the record is: by default a preference of any type; 'auto' finds it out. Of a preference,
    'prompt_completion' takes the best completion. 'language_modeling' takes the `text` of any record.

    Error messages begin with `source`, the record's place. Raises TiedRowError if no completion is better,
    and UndesirableRowError if 'prompt_completion' finds one that is undesirable.
    """
    try:
        row = record if isinstance(record, Row) else Row(record, fields.renamed, source)
        form = find_form(row, kind)
        _check_media(row)
        weight, split = _parse_number(row, "weight"), parse_split(row.get("split"), fields.split)
        if weight is not None and weight < 0:
            problem = f"the weight should not be negative, but it is {describe_value(weight)}"
            remedy = "put the better completion first or leave the row out"
            raise ExampleError(f"{problem}: {remedy}.", fields.weight)
        columns: dict[str, Any] = {"weight": weight, "split": split, "source": source, "form": form.form}
        columns["subset"] = parse_subset(row.peek("subset"))  # which evaluation alone uses
        if form.is_text:
            return _to_text_example(row, form, kind, columns)
        prompt, completions = _parse_turns(row, fields, form)
        columns |= {"label": form.label, "ranks": form.ranks, "tools": _parse_tools(row)}
        if kind != "prompt_completion" and (len(completions) > 1 or form.label is not None):
            columns["margin"] = _parse_number(row, "margin")
        example = Example(prompt, completions, **columns)
        return to_prompt_completion(example) if kind == "prompt_completion" else example
    except ExampleError as error:
        error.source = source
        raise


def _to_text_example(row: Row, form: Comparison, kind: Kind, columns: dict[str, Any]) -> Example:
    """The example of a text: a document, unless it says what is not scored or `kind` is otherwise."""
    ((field, value),) = form.completions.items()
    text = parse_text(value, field)
    if kind == "language_modeling" or (kind == "auto" and form.form == "text"):
        return Example("", (text,), is_document=True, **columns)
    return Example("", (text,), loss_masking_spans=parse_spans(row, text), **columns)


def _parse_turns(row: Row, fields: Fields, form: Comparison) -> tuple[str | Turns, tuple[Completion, ...]]:
    """Prompt and completions, as texts or as turns of a dialogue."""
    values = form.completions
    _check_forms(values)
    prompt_field = _find_prompt(row, fields, form.prompt_fields)
    if not isinstance(prompt_field.value, str):  # beside a text, such a completion is meant as text
        values = {field: parse_messages_text(value) for field, value in values.items()}
        _check_forms(values)
    if all(isinstance(value, str) for value in values.values()):
        prompt, completions = parse_texts(values, prompt_field, needs_prompt=fields.prompt != "")
    else:
        dialogues = {field: parse_messages(value, field) for field, value in values.items()}
        prompt, completions = parse_dialogues(dialogues, prompt_field)
    return _add_columns(row, prompt, prompt_field), completions


def _check_forms(values: dict[str, Any]) -> None:
    forms = {field: _check_form(value, field) for field, value in values.items()}
    for field, value in values.items():
        if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
            problem = "the completion should be text or a list of messages, but it is a list of texts"
            raise ExampleError(f"{problem}: write one text, or rank several under 'completions'.", field)
    first = next(iter(forms))
    for field, form in forms.items():
        if form != forms[first]:
            problem = f"the completion should be {forms[first]} as in field '{first}', but it is {form}"
            raise ExampleError(f"{problem}: write all completions in one form.", field)


def _find_prompt(row: Row, fields: Fields, form_fields: tuple[str, ...]) -> Prompt:
    if fields.prompt == "":
        return Prompt(row.record)
    if fields.prompt is not None and "prompt" not in row and fields.prompt not in row.record:
        raise missing_field_error(row.record, fields.prompt, "name its column by --columns")
    names = ("prompt",) if fields.prompt else form_fields or PROMPT_FIELDS
    blank = None
    for name in (name for name in names if name in row):
        prompt = Prompt(row.record, row.column(name), parse_messages_text(row[name]))
        _check_form(prompt.value, prompt.field)
        if not prompt.is_blank:
            return prompt
        blank = blank or prompt
    known = next((row.column(name) for name in names if row.column(name) in row.record), "")
    return blank or Prompt(row.record, known, None)


def _add_columns(row: Row, prompt: str | Turns, found: Prompt) -> str | Turns:
    """The prompt with what other columns add: Alpaca's `input`, a `system` text, a `history` of turns."""
    names = {"instruction": ("input", "query"), "query": ("input",), "question": ("input",)}
    name = row.first_of(*names.get(found.field, ()))
    given = row[name] if name is not None else ""
    if not isinstance(given, str):
        problem = f"the input should be text, but it is {describe_value(given)}"
        raise ExampleError(f"{problem}: write it as text.", name)
    if given.strip():
        check_unicode(given, str(name))
        if isinstance(prompt, str):
            prompt = f"{prompt}\n{given}"
        else:
            prompt = (
                *prompt[:-1],
                Message(prompt[-1].role, f"{prompt[-1].text}\n{given}", prompt[-1].extras),
            )
    before: list[Message] = []
    if (name := row.first_of("system", "system_prompt")) is not None:
        if not isinstance(row[name], str):
            problem = f"the system text should be text, but it is {describe_value(row[name])}"
            raise ExampleError(f"{problem}: write it as text.", name)
        before += [Message("system", check_unicode(row[name], name))] if row[name].strip() else []
    if "history" in row:
        before += _parse_history(row.get_json("history"))
    if not before:
        return prompt
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    if before[0].role == "system" and turns[0].role == "system":
        if turns[0].text.strip() != before[0].text.strip():
            problem = "the system text should stand once, but the prompt has another"
            raise ExampleError(f"{problem}: leave one of the two out.", name)
        before = before[1:]
    return (*before, *turns)


def _parse_history(history: Any) -> list[Message]:
    turns: list[Message] = []
    if isinstance(history, (list, tuple)) and history and all(isinstance(turn, Mapping) for turn in history):
        return list(parse_messages(history, "history"))
    for pair in history if isinstance(history, (list, tuple)) else [history]:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(t, str) for t in pair)):
            form = "a list of pairs of question and answer"
            problem = f"the history should be {form}, but it holds {describe_value(pair)}"
            raise ExampleError(f"{problem}: write it so, or put the turns into the prompt.", "history")
        turns += [
            Message("user", check_unicode(pair[0], "history")),
            Message("assistant", check_unicode(pair[1], "history")),
        ]
    return turns


def _check_media(row: Row) -> None:
    for name in MEDIA_FIELDS:
        if row.get(name):
            problem = f"a row should be text alone, but it has {describe_value(row[name])} in '{name}'"
            raise ExampleError(f"{problem}, which a language model cannot read: leave the row out.", name)


def _parse_tools(row: Row) -> tuple[Any, ...]:
    """The tools that a dialogue may call, a list or such a list as JSON text."""
    tools = row.get_json("tools")
    if not tools:
        return ()
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        problem = f"the tools should be a list of objects, but they are {describe_value(tools)}"
        raise ExampleError(f"{problem}: write them as JSON schemas.", "tools")
    for text in iterate_texts(list(tools)):
        check_unicode(text, "tools")
    return tuple(_wrap_tool(tool) for tool in tools)


def _wrap_tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool as templates expect it; ShareGPT's are functions without the object around them."""
    is_bare = "name" in tool and "function" not in tool and "type" not in tool
    return {"type": "function", "function": tool} if is_bare else tool


def _check_form(value: Any, field: str) -> str:
    """The name of the value's form; ExampleError if it has none."""
    if isinstance(value, str):
        check_unicode(value, field)
        return "a string"
    if not isinstance(value, (list, tuple, Mapping)):
        problem = f"the value should be text or a list of messages, but it is {describe_value(value)}"
        raise ExampleError(f"{problem}: write it in one of these forms or leave the row out.", field)
    return "messages"


def parse_subset(value: Any) -> str | None:
    """The name of a part of a benchmark; None for what is no name."""
    return str(value) if isinstance(value, (str, int)) and str(value).strip() else None


def parse_split(value: Any, field: str) -> str | None:
    """'train' or 'test' of a split's name, which may go on as in `train_prefs`."""
    if value is None:
        return None
    spelled = value.strip().lower().replace("-", "_") if isinstance(value, str) else ""
    split = _SPLIT_WORDS.get(spelled, _SPLIT_WORDS.get(spelled.split("_")[0]))
    if split is None:
        problem = f"the split should be 'train' or 'test', but it is {describe_value(value)}"
        remedy = "rename it, leave the field out, or name another column with --columns split=NAME"
        raise ExampleError(f"{problem}: {remedy}.", field)
    return split


def _parse_number(row: Row, name: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        problem = f"the value should be a finite number, but it is {describe_value(value)}"
        remedy = f"correct it or rename the column, or ignore it with --columns {name}="
        raise ExampleError(f"{problem}: {remedy}.", row.column(name))
    return float(value)
