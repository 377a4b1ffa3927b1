"""Errors that name the place of an example in its file, and values in the words of an error message."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

OnError = Literal["raise", "skip"]


class ExampleError(ValueError):
    """An example that cannot be used: "prefs.jsonl, line 12, field 'prompt', message 2: <problem>".

    `message` counts from 1. It is 0, `field` None and `source` empty where the place is not known.
    """

    def __init__(self, problem: str, field: str | None = None, message: int = 0, *, source: str = "") -> None:
        super().__init__(problem)
        self.source, self.field, self.message = source, field, message

    def __str__(self) -> str:
        field = f"field '{self.field}'" if self.field else ""
        message = f"message {self.message}" if self.message else ""
        place = ", ".join(filter(None, (self.source, field, message)))
        return f"{place}: {self.args[0]}" if place else self.args[0]


@contextmanager
def collect_errors(errors: list[ExampleError], on_error: OnError, source: str = "") -> Iterator[None]:
    """Raise a ValueError of the body as an `ExampleError` at `source`; for 'skip', add it to `errors`."""
    try:
        yield
    except ValueError as error:
        located = error if isinstance(error, ExampleError) else ExampleError(str(error))
        located.source = located.source or source
        if on_error == "raise":
            raise located from error.__cause__
        errors.append(located)


TEXT_COLUMNS = ("prompt", "chosen", "rejected", "completions", "completion", "label", "text")
"""The columns that --columns gives other names, but for those that a row need not have."""


def find_other_case(record: Mapping[Any, Any]) -> dict[str, str]:
    """The columns that differ from the usual ones in case alone, by the usual names."""
    columns = {str(key).lower(): str(key) for key in record}
    return {name: columns[name] for name in TEXT_COLUMNS if name in columns and name not in record}


def format_columns(names: Mapping[str, str]) -> str:
    """Names of columns as on the command line."""
    return " ".join(["--columns", *(f"{name}={column}" for name, column in names.items())])


def missing_field_error(record: Mapping[Any, Any], field: str, remedy: str) -> ExampleError:
    if field in (other := find_other_case(record)):
        remedy = f"name its columns with {format_columns(other)}"
    return ExampleError(f"a row should have this field, but it has {quote_keys(record)}: {remedy}.", field)


def check_on_error(on_error: str) -> None:
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error should be 'raise' or 'skip', but it is {on_error!r}: choose one of them.")


def describe_value(value: Any) -> str:
    """A value in the words of an error message; the length of a long text instead of the text."""
    match value:
        case None | bool():
            return json.dumps(value)
        case int() | float():
            return "a number" if 1e12 <= abs(value) < math.inf else f"the number {value}"
        case "":
            return "an empty string"
        case str():
            return repr(value) if len(value) <= 40 else f"a string of {len(value)} characters"
        case list() | tuple():
            return f"a list of {len(value)}" if value else "an empty list"
        case Mapping():
            return f"an object with {quote_keys(value)}" if value else "an empty object"
        case _:
            return f"a value of type {type(value).__name__}"


def quote_keys(record: Mapping[Any, Any]) -> str:
    """The first twelve keys of a record, quoted; 'no fields' for an empty record."""
    keys = [f"'{key}'" for key in record]
    return ", ".join(keys[:12] + ["..."] * (len(keys) > 12)) or "no fields"
