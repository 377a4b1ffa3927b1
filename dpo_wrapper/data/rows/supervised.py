"""The forms of rows that are imitated: prompts with a completion, dialogues, masked texts and documents."""

from dataclasses import replace
from typing import Any

from dpo_wrapper.data.errors import (
    ExampleError,
    describe_value,
    find_other_case,
    format_columns,
    missing_field_error,
    quote_keys,
)
from dpo_wrapper.data.examples import Example, Kind
from dpo_wrapper.data.rows.comparison import Comparison, UndesirableRowError
from dpo_wrapper.data.rows.forms import (
    COMPLETION_NAMES,
    DIALOGUE_NAMES,
    NO_SIDE,
    find_comparison,
    one_completion,
)
from dpo_wrapper.data.rows.messages import check_unicode, parse_messages, parse_messages_text
from dpo_wrapper.data.rows.row import Row

SPANS = "loss_masking_spans"


def find_form(row: Row, kind: Kind) -> Comparison:
    """What a row compares or shows, whatever its form, as far as `kind` allows it.

    Raises ExampleError for a row of no known form or of another kind, and TiedRowError if no completion is
    better.
    """
    if kind == "language_modeling":
        form = find_text(row)
    else:
        form = find_comparison(row)
        if form is None and kind in ("auto", "prompt_completion"):
            form = find_completion(row) or find_text(row)
    if form is None:
        raise no_form_error(row, kind)
    return form


def find_completion(row: Row) -> Comparison | None:
    """One completion of a prompt, or a dialogue."""
    name = row.first_of(*COMPLETION_NAMES)
    if name is None:
        return None
    dialogue = row.first_of(*DIALOGUE_NAMES)
    if name != "completion" and dialogue is not None and is_answered(row[dialogue]):
        name = dialogue  # beside which the answer alone may stand
    if SPANS in row:
        problem = f"the spans should stand beside a text alone, but the row has '{row.column(name)}'"
        remedy = f"write prompt and completion as one 'text', or ignore the column with --columns {SPANS}="
        raise ExampleError(f"{problem}: {remedy}.", row.column(SPANS))
    return one_completion(row, "dialogue" if name in DIALOGUE_NAMES else "prompt and completion", name)


def is_answered(dialogue: Any) -> bool:
    """Whether a dialogue ends in an assistant's turn."""
    turns = parse_messages_text(dialogue)
    last = turns[-1] if isinstance(turns, (list, tuple)) and turns else None
    try:
        return parse_messages(last, "")[-1].role == "assistant"
    except ExampleError:
        return False


def find_text(row: Row) -> Comparison | None:
    """A text to continue from its beginning, some of whose characters may be masked."""
    name = row.first_of("text", "content")
    if name is None or (name == "content" and row.first_of("role", "from") is not None):
        return None
    form = "text with masked spans" if row.has_column(row.column(SPANS)) else "text"
    return Comparison(form, {row.column(name): row[name]}, is_text=True)


def no_form_error(row: Row, kind: Kind) -> ExampleError:
    """What is wrong with a row of no known form, or of another kind."""
    keys = quote_keys(row.record)
    if kind in FORMS:
        problem = f"a row should have {FORMS[kind]}, but it has {keys}"
        columns = format_columns(find_other_case(row.record))
        return ExampleError(f"{problem}: name its fields with {columns}, or leave it out.")
    if row.first_of(*DIALOGUE_NAMES, "completion", "response", "output", "text") is None:
        return missing_field_error(row.record, row.column("chosen"), NO_SIDE)
    problem = f"a row should compare answers or label one, but it has {keys}, one answer alone"
    return ExampleError(f"{problem}: add 'rejected' or 'label', or use the row for supervised training.")


_IMITATED = "'prompt' and 'completion', 'messages', or 'text' with 'loss_masking_spans' (prompt_completion)"
FORMS = {
    "auto": f"'chosen' and 'rejected' (preference), {_IMITATED}, or 'text' (language_modeling)",
    "prompt_completion": _IMITATED,
    "language_modeling": "'text' (language_modeling)",
}
"""What rows of a kind have, in the words of an error message."""


def parse_text(value: Any, field: str) -> str:
    """The text of a document."""
    if not isinstance(value, str):
        problem = f"the text should be a string, but it is {describe_value(value)}"
        raise ExampleError(f"{problem}: write it as plain text or leave the row out.", field)
    return check_unicode(value, field)


def parse_spans(row: Row, text: str) -> tuple[tuple[int, int], ...]:
    """The ranges of the text's characters that are not scored."""
    spans = row.get_json(SPANS)
    field = row.column(SPANS)
    if not isinstance(spans, (list, tuple, type(None))):
        problem = (
            f"the spans should be a list of pairs of start and end, but they are {describe_value(spans)}"
        )
        raise ExampleError(f"{problem}: write them like [[0, 12], [20, 31]].", field)
    for span in spans or ():
        is_pair = isinstance(span, (list, tuple)) and len(span) == 2
        if not is_pair or any(isinstance(end, bool) or not isinstance(end, int) for end in span):
            problem = f"a span should be a pair of integers, start and end, but it is {describe_value(span)}"
            raise ExampleError(f"{problem}: write it like [0, 12].", field)
        if not 0 <= span[0] <= span[1] <= len(text):
            problem = f"a span should lie in the text of {len(text)} characters, but it is {list(span)}"
            raise ExampleError(f"{problem}: correct it; [start, end) counts characters from 0.", field)
    return tuple((start, end) for start, end in spans or ())


def to_prompt_completion(example: Example) -> Example:
    """The prompt of a preference with its best completion; UndesirableRowError if the only one is bad."""
    if example.label is False:
        raise UndesirableRowError
    return replace(example, completions=example.completions[:1], label=None, ranks=None)
