"""What a row compares or shows, and the labels and scores by which it does."""

import math
from dataclasses import dataclass
from typing import Any

from dpo_wrapper.data.errors import ExampleError, describe_value


class LeftOutError(Exception):
    """A row that can be read and teaches nothing; `count` is its name among what `ReadExamples` counts."""

    count = ""


class TiedRowError(LeftOutError):
    """A row none of whose completions is better than another: there is nothing to learn from."""

    count = "num_tied"

    def __str__(self) -> str:
        return "no completion is better than another"


class UndesirableRowError(LeftOutError):
    """A row whose only completion is undesirable: there is nothing to imitate."""

    count = "num_undesirable"

    def __str__(self) -> str:
        return "its completion is undesirable, so not to be imitated"


@dataclass(frozen=True)
class Comparison:
    """What a row compares; one completion without a label is compared with nothing, but imitated.

    Attributes:
        form: the name of the row's form.
        completions: values by the names of their fields, the best first.
        label: whether the only completion is desirable.
        prompt_fields: where this form has its prompt, if not in the usual columns.
        ranks: a number for each completion, equal for ties; None where the order is the rank.
        is_text: whether the only completion is a text without a prompt.
    """

    form: str
    completions: dict[str, Any]
    label: bool | None = None
    prompt_fields: tuple[str, ...] = ()
    ranks: tuple[float, ...] | None = None
    is_text: bool = False


def parse_label(value: Any, field: str) -> bool:
    """A label as true or false."""
    spelled = value.strip().lower() if isinstance(value, str) else value
    known = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
    if isinstance(spelled, bool) or spelled in (0, 1):
        return bool(spelled)
    if isinstance(spelled, str) and spelled in known:
        return known[spelled]
    problem = f"the label should be true or false, but it is {describe_value(value)}"
    raise ExampleError(f"{problem}: say whether the completion is desirable.", field)


def parse_score(value: Any, field: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not abs(number) < math.inf:
        problem = f"a score should be a finite number, but it is {describe_value(value)}"
        raise ExampleError(f"{problem}: correct it or leave the row out.", field)
    return number
