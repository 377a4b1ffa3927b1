"""The forms in which files write what is compared: pairs, ranked lists, and completions with a label."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_wrapper.data.errors import ExampleError, describe_value, missing_field_error, quote_keys
from dpo_wrapper.data.rows.choices import CHOICE_NAMES, SIDE_NAMES, find_choice
from dpo_wrapper.data.rows.comparison import Comparison, TiedRowError, parse_label, parse_score
from dpo_wrapper.data.rows.messages import json_or_text, parse_messages_text
from dpo_wrapper.data.rows.row import Row

SCORE_NAMES = ("scores", "score", "ratings", "rating", "overall_score", "rewards", "reward")
RANK_NAMES = ("ranks", "rank", "ranking")
NO_SIDE = "add it, name its column by --columns, or give 'completions', or 'completion' and 'label'"
TEXT_NAMES = ("completion", "response", "text", "content", "answer", "output", "messages")


def find_comparison(row: Row) -> Comparison | None:
    """What a row compares, whatever its form; None if it compares nothing.

    Raises ExampleError if a part of a comparison is missing, and TiedRowError if no completion is better.
    """
    sides = ("chosen", "rejected")
    is_named_choice = _is_choice_by_name(row)
    if is_named_choice or not any(side in row for side in sides):
        finders = (find_openai_pair, find_messages_pair, find_labelled, find_list, find_choice)
        for find in finders[-1:] if is_named_choice else finders:
            if (comparison := find(row)) is not None:
                return comparison
    missing = [side for side in sides if side not in row and row.column(side) not in row.record]
    if len(missing) == len(sides):
        return None
    for side in missing:
        raise missing_field_error(row.record, row.column(side), NO_SIDE)
    return Comparison("pair", {row.column(side): row.get(side) for side in sides})


def _is_choice_by_name(row: Row) -> bool:
    """Whether the columns named as chosen and rejected are two responses beside a choice."""
    names = (row.column("chosen"), row.column("rejected"))
    is_renamed = names != ("chosen", "rejected") and all(side in row for side in ("chosen", "rejected"))
    if not is_renamed or row.first_of(*CHOICE_NAMES) is None:
        return False
    if names in SIDE_NAMES or names[::-1] in SIDE_NAMES:
        return True
    if "label" in row:
        problem = "a pair should say by its columns which side is better, but 'label' may say otherwise"
        raise ExampleError(
            f"{problem}: put the better one first, or ignore it with --columns label=.", "label"
        )
    return False


def find_openai_pair(row: Row) -> Comparison | None:
    """`input.messages`, `preferred_output`, `non_preferred_output`: OpenAI's and Azure's form."""
    names = ("preferred_output", "non_preferred_output")
    given = [name for name in names if name in row]
    if not given:
        return None
    for name in names:
        if name not in row:
            raise missing_field_error(row.record, name, f"give both '{names[0]}' and '{names[1]}'")
    return Comparison("pair (OpenAI)", {name: row[name] for name in names}, prompt_fields=("input.messages",))


def find_messages_pair(row: Row) -> Comparison | None:
    """ms-swift's `messages` or `response`, and `rejected_response` or `rejected_messages`."""
    rejected = row.first_of("rejected_response", "rejected_messages")
    messages = row.first_of("messages", "conversations")
    if rejected is not None and messages is None and "response" in row:
        return Comparison("pair (response)", {name: row[name] for name in ("response", rejected)})
    if rejected is None or messages is None:
        return None
    dialogue, other = (parse_messages_text(row[name]) for name in (messages, rejected))
    if not isinstance(dialogue, Sequence) or isinstance(dialogue, str) or not dialogue:
        return None
    if isinstance(other, str):
        other = [*dialogue[:-1], {"role": "assistant", "content": other}]
    return Comparison("pair (messages)", {messages: dialogue, rejected: other}, prompt_fields=("",))


def find_labelled(row: Row) -> Comparison | None:
    """One completion and whether it is desirable: `completion` or a dialogue, and `label` or `kto_tag`."""
    label = row.first_of("label", "kto_tag")
    completion = row.first_of(*COMPLETION_NAMES)
    if "labels" in row and "completions" in row and "label" not in row:
        problem = "a row should rank its completions, but 'labels' says of each step whether it is right"
        raise ExampleError(f"{problem}: such data trains step-by-step reward models, leave it out.", "labels")
    if completion is None and row.column("completion") in row.record:
        completion = "completion"  # null
    is_choice = any(one in row and other in row for one, other in SIDE_NAMES)
    if completion is None or is_choice or "completions" in row or label is None:
        return None
    is_desirable = parse_label(row[label], label)
    return one_completion(row, "labelled completion", completion, is_desirable)


def one_completion(row: Row, form: str, name: str, label: bool | None = None) -> Comparison:
    """The completion of a row that has one: in a dialogue that is the last turn."""
    # a text beside question and answer is often both of them together
    fields = ("",) if name in DIALOGUE_NAMES else (*(n for n in PROMPT_FIELDS if n != "text"), "text")
    return Comparison(form, {row.column(name): row.get(name)}, label, fields)


def find_list(row: Row) -> Comparison | None:
    """`completions`, the best first, or with scores or ranks, in the list or in a column of their own."""
    name = row.first_of("completions", "responses", "generations", "answers")
    if name is None:
        return None
    ranked = json_or_text(row[name])
    if not isinstance(ranked, Sequence) or isinstance(ranked, str) or len(ranked) < 2:
        problem = f"the completions should be a ranked list, but they are {describe_value(ranked)}"
        raise ExampleError(f"{problem}: give at least two, the best first.", name)
    values = {f"{name}[{k}]": completion_text(item) for k, item in enumerate(ranked)}
    numbers = find_numbers(row, name, ranked)
    if numbers is None:
        return Comparison("ranked list", values)
    field, given, sign = numbers
    keys = [sign * parse_score(value, field) for value in given]
    order = sorted(range(len(keys)), key=lambda k: -keys[k])
    if len(set(keys)) == 1:
        raise TiedRowError
    fields = list(values)
    ordered = {fields[k]: values[fields[k]] for k in order}
    return Comparison(f"ranked list (by {field})", ordered, ranks=tuple(-keys[k] for k in order))


def completion_text(item: Any) -> Any:
    """The completion in an element of a list, which may be an object that also holds its score."""
    if isinstance(item, Mapping) and not {"role", "from"} & item.keys():
        return next((item[name] for name in TEXT_NAMES if item.get(name) is not None), item)
    return item


def find_numbers(row: Row, name: str, items: Sequence[Any]) -> tuple[str, list[Any], int] | None:
    """The column with the score or rank of each completion, and the sign by which more is better."""
    objects = [item for item in items if isinstance(item, Mapping) and not {"role", "from"} & item.keys()]
    for names, sign in ((SCORE_NAMES, 1), (RANK_NAMES, -1)):
        for field in names:
            numbers = [item[field] for item in objects if item.get(field) is not None]
            if numbers and len(numbers) < len(items):
                problem = f"every completion should have a {field}, but {len(items) - len(numbers)} have none"
                raise ExampleError(f"{problem}: add it, or leave the row out.", name)
            if numbers:
                return f"{name}.{field}", numbers, sign
            if field in row and isinstance(value := json_or_text(row.record[field]), (list, tuple)):
                if len(value) != len(items):
                    problem = f"there should be one number for each of {len(items)} completions"
                    raise ExampleError(f"{problem}, but there are {len(value)}: add or remove some.", field)
                return field, list(row.get_json(field)), sign
    unknown = {key: value for item in objects for key, value in item.items() if is_number(value)}
    if unknown:
        form = "one called 'score' or 'rank'"
        problem = f"completions with numbers should have {form}, but they have {quote_keys(unknown)}"
        raise ExampleError(f"{problem}: rename the one by which they are ranked.", name)
    return None


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


PROMPT_FIELDS = (
    "prompt", "text", "instruction", "question", "query", "context", "conversations", "messages", "problem",
    "input",
)  # fmt: skip
"""The columns in which a row may have its prompt."""

DIALOGUE_NAMES = ("messages", "conversations")
COMPLETION_NAMES = ("completion", "response", "output", "answer", *DIALOGUE_NAMES)
"""The columns in which a row may have its only completion."""

COLUMNS = {
    *(name for names in SIDE_NAMES for name in names), *CHOICE_NAMES, *SCORE_NAMES, *RANK_NAMES, *TEXT_NAMES,
    "chosen", "rejected", "completions", "responses", "labels", "kto_tag", "conversations", "input", "tools",
    "preferred_output", "non_preferred_output", "rejected_response", "rejected_messages", "winner_model_a",
    "winner_model_b", "generations", "answers", "loss_masking_spans",
}  # fmt: skip
"""The columns that forms look for."""

ROW_KEYS = {
    "completions", "completion", "responses", "messages", "conversations", "preferred_output",
    "rejected_response", *(one for one, _ in SIDE_NAMES),
}  # fmt: skip
"""Columns by which a JSON object is known to be a row."""
