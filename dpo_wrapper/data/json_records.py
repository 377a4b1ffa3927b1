"""The records of JSON and JSON lines, each with its place in the file."""

import io
import json
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple

from dpo_wrapper.data.errors import ExampleError, describe_value

_BOM = b"\xef\xbb\xbf"

Record = tuple[str, Any] | ExampleError
"""A record with its place, or the error of a line that holds none."""


def read_json_lines(file: IO[bytes], name: str) -> Iterator[Record]:
    r"""One record per line. Only b"\n" ends a line: JSON strings may hold U+2028 and the like."""
    return (line.parse() for line in read_raw_lines(file, name))


def read_raw_lines(file: IO[bytes], name: str) -> Iterator["RawLine"]:
    """The lines that are not empty, not parsed yet."""
    for number, line in enumerate(file, 1):
        # A line break at the end would put the column of an error on a line of its own.
        if line := (line.removeprefix(_BOM) if number == 1 else line).rstrip():
            yield RawLine(name, number, line)


class RawLine(NamedTuple):
    """A line of JSON in a file, which is cheap to read and to hand to another process."""

    name: str
    number: int
    line: bytes

    def parse(self) -> Record:
        name, number, line = self
        try:
            return f"{name}, line {number}", _parse_json(decode(line, name, number), name, number)
        except ExampleError as error:
            return error


def read_json(file: IO[bytes], name: str, row_keys: set[str]) -> Iterator[Record]:
    """The records of one JSON document, or of several one after another.

    A document is a list of objects, an object with one list under 'data' or 'rows', an object of columns, or
    one record: an object with one of `row_keys`.
    """
    data = file.read().removeprefix(_BOM)
    if not data.strip():
        return
    text = decode(data, name)
    try:
        document = _parse_json(text, name)
    except ExampleError as error:
        cause = error.__cause__
        if not (isinstance(cause, json.JSONDecodeError) and cause.msg == "Extra data"):
            raise
        first_line = text.lstrip().split("\n", 1)[0]
        if is_json(first_line):  # JSON lines under another name
            yield from read_json_lines(io.BytesIO(data), name)
        else:
            yield from _read_concatenated(text, name)
        return
    if isinstance(document, Mapping) and row_keys & document.keys():
        try:
            columns = _as_columns(document, row_keys)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if columns is None:
            yield f"{name}, line 1", document
        else:
            yield from ((f"{name}, row {number}", record) for number, record in enumerate(columns, 1))
        return
    values = [document.get("data"), document.get("rows")] if isinstance(document, Mapping) else [document]
    lists = [value for value in values if isinstance(value, list)]
    if len(lists) != 1:
        form = "a list of objects, or an object with one list under 'data' or 'rows'"
        problem = f"the file should hold {form}, but it holds {describe_value(document)}"
        raise ValueError(f"{name}: {problem}: write the rows as one list.")
    for number, record in enumerate(lists[0], 1):
        yield f"{name}, row {number}", record


def _read_concatenated(text: str, name: str) -> Iterator[Record]:
    """Objects one after another, each over several lines."""
    decoder, place = json.JSONDecoder(), 0
    while place < len(text):
        if text[place].isspace() or text[place] == ",":
            place += 1
            continue
        line = text.count("\n", 0, place) + 1
        try:
            record, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            reason = str(error).split(":")[0]
            problem = f"the file should be JSON, but from here on it is broken JSON ({reason})"
            raise ExampleError(f"{problem}: correct it.", source=f"{name}, line {line}") from error
        yield f"{name}, line {line}", record


def _as_columns(document: Mapping[str, Any], row_keys: set[str]) -> list[dict[str, Any]] | None:
    """The rows of an object whose values are columns, lists or objects by row; None if it is a row itself."""
    values = list(document.values())
    if all(isinstance(value, Mapping) and not {"role", "from", "content"} & value.keys() for value in values):
        numbers = {number: None for value in values for number in value}  # as pandas writes them
        return [{key: document[key].get(number) for key in document} for number in numbers]
    cells = [cell for key in row_keys & document.keys() for cell in as_list(document[key])]
    if not all(isinstance(value, list) for value in values) or not cells:
        return None
    if any(isinstance(cell, Mapping) for cell in cells):  # messages of one row
        return None
    lengths = {key: len(value) for key, value in document.items()}
    if len(set(lengths.values())) != 1:
        counts = ", ".join(f"'{key}' has {length}" for key, length in lengths.items())
        raise ValueError(
            f"the columns should have as many rows, but {counts}: write the same number of each."
        )
    return [dict(zip(document, row, strict=True)) for row in zip(*values, strict=True)]


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def decode(data: bytes, name: str, line: int | None = None) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = line or data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        problem = f"the text should be UTF-8, but byte {column} of the line is 0x{data[error.start]:02x}"
        raise ExampleError(f"{problem}: save the text as UTF-8.", source=f"{name}, line {line}") from error


def _parse_json(text: str, name: str, line: int | None = None) -> Any:
    """The JSON value of a file, or of one of the lines of a file of JSON lines."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        form = "the line should be one JSON object" if line else "the file should be JSON"
        remedy = "correct it"
        if line and text.lstrip().startswith("["):
            remedy += ", or name the file .json if it is one JSON list"
        elif line and text.strip() == "{":
            remedy += ", or name the file .json if its objects go over several lines"
        if isinstance(error, json.JSONDecodeError):
            place = f"{name}, line {line or error.lineno}, column {error.colno}"
            problem = f"broken JSON ({error.msg})"
        else:  # numbers of thousands of digits, thousands of brackets
            place = f"{name}, line {line}" if line else name
            problem = f"JSON beyond limits ({error})"
        raise ExampleError(f"{form}, but it is {problem}: {remedy}.", source=place) from error
