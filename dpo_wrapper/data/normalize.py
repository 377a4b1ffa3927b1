"""A record of any form -> `Example`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_wrapper.data.chat import Prompt, check_unicode, parse_dialogues, parse_messages, parse_texts
from dpo_wrapper.data.errors import ExampleError, describe_value, missing_field_error
from dpo_wrapper.data.examples import DEFAULT_FIELDS, Example, Fields

PROMPT_FIELDS = ("prompt", "text", "conversations", "messages")

_SPLITS = dict.fromkeys(("train", "training"), "train")
_SPLITS |= dict.fromkeys(("test", "validation", "valid", "eval", "held-out", "heldout"), "test")


def to_example(record: Any, fields: Fields = DEFAULT_FIELDS, source: str = "") -> Example:
    r"""The example that a record of any supported form stands for.

    A record has a prompt and one of:
        `chosen` and `rejected`: a pair;
        `completions`: a ranked list, the best first;
        `completion` and `label` (true or false): one completion, desirable or not.

    Prompt and completions are plain strings, whole dialogues as one text with `\n\nHuman:` and
    `\n\nAssistant:` turns, lists of {role, content} messages, or ShareGPT's {from, value}. In a dialogue the
    completion is always the last assistant turn, and what comes before it must be the same for all
    completions.

    Error messages begin with `source`, the record's place.
    """
    try:
        if not isinstance(record, Mapping):
            problem = "a row should be an object with prompt and completions"
            raise ExampleError(f"{problem}, but it is {describe_value(record)}: write one object per row.")
        values, label = _find_completions(record, fields)
        found = _find_prompt(record, fields)
        if all(isinstance(value, str) for value in values.values()):
            prompt, completions = parse_texts(values, found)
        else:
            dialogues = {field: parse_messages(value, field) for field, value in values.items()}
            prompt, completions = parse_dialogues(dialogues, found)
        weight, margin = (_parse_number(record, field) for field in (fields.weight, fields.margin))
        if weight is not None and weight < 0:
            problem = f"the weight should not be negative, but it is {describe_value(weight)}"
            remedy = "put the better completion first or leave the row out"
            raise ExampleError(f"{problem}: {remedy}.", fields.weight)
        split = _parse_split(record, fields.split)
        return Example(prompt, completions, label, weight, margin, split, source)
    except ExampleError as error:
        error.source = source
        raise


def _find_completions(record: Mapping[Any, Any], fields: Fields) -> tuple[dict[str, Any], bool | None]:
    """The values of the completions by the names of their fields, the best first, and the label."""
    # A Parquet file of several forms has nulls in the columns of the other forms.
    present = {key for key, value in record.items() if value is not None}
    label = None
    if {fields.chosen, fields.rejected} & present or not {"completions", "completion"} & present:
        for field in (fields.chosen, fields.rejected):
            if field not in record:
                remedy = "add it, name its field, or give 'completions', or 'completion' and 'label'"
                raise missing_field_error(record, field, remedy)
        values = {field: record[field] for field in (fields.chosen, fields.rejected)}
    elif "completions" in present:
        ranked = record["completions"]
        if not isinstance(ranked, Sequence) or isinstance(ranked, str) or len(ranked) < 2:
            problem = f"the completions should be a ranked list, but they are {describe_value(ranked)}"
            raise ExampleError(f"{problem}: give at least two, the best first.", "completions")
        values = {f"completions[{k}]": value for k, value in enumerate(ranked)}
    else:
        label, values = record.get("label"), {"completion": record["completion"]}
        if not isinstance(label, bool):
            problem = f"the label should be true or false, but it is {describe_value(label)}"
            raise ExampleError(f"{problem}: say whether the completion is desirable.", "label")
    forms = {field: _check_form(value, field) for field, value in values.items()}
    first = next(iter(forms))
    for field, form in forms.items():
        if form != forms[first]:
            problem = f"the completion should be {forms[first]} as in field '{first}', but it is {form}"
            raise ExampleError(f"{problem}: write all completions in one form.", field)
    return values, label


def _find_prompt(record: Mapping[Any, Any], fields: Fields) -> Prompt:
    if fields.prompt is not None and fields.prompt not in record:
        raise missing_field_error(record, fields.prompt, "say which field holds the prompt")
    names = [fields.prompt] if fields.prompt else PROMPT_FIELDS
    prompts = [Prompt(record, name, record[name]) for name in names if name in record]
    for prompt in prompts:
        if prompt.value is not None:
            _check_form(prompt.value, prompt.field)
        if not prompt.is_blank:
            return prompt
    return prompts[0] if prompts else Prompt(record)


def _check_form(value: Any, field: str) -> str:
    """The name of the value's form; ExampleError if it has none."""
    if isinstance(value, str):
        check_unicode(value, field)
        return "a string"
    if not isinstance(value, (list, tuple, Mapping)):
        problem = f"the value should be text or a list of messages, but it is {describe_value(value)}"
        raise ExampleError(f"{problem}: write it in one of these forms or leave the row out.", field)
    return "messages"


def _parse_split(record: Mapping[Any, Any], field: str) -> str | None:
    value = record.get(field)
    split = _SPLITS.get(value.strip().lower()) if isinstance(value, str) else None
    if value is not None and split is None:
        problem = f"the split should be 'train' or 'test', but it is {describe_value(value)}"
        raise ExampleError(f"{problem}: rename it or leave the field out.", field)
    return split


def _parse_number(record: Mapping[Any, Any], field: str) -> float | None:
    value = record.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
        problem = f"the value should be a finite number, but it is {describe_value(value)}"
        raise ExampleError(f"{problem}: correct it or rename the column.", field)
    return float(value)
