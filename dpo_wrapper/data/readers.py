"""Preference files -> records with their places -> examples.

A file is JSON lines, JSON or Parquet; the first two may be gzipped.
"""

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from dpo_wrapper.data.errors import ExampleError, OnError, check_on_error, collect_errors, describe_value
from dpo_wrapper.data.examples import DEFAULT_FIELDS, Example, Fields
from dpo_wrapper.data.normalize import to_example

PathLike = str | os.PathLike[str]

_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
_KNOWN_ENDINGS = "one that ends in .jsonl, .json (either with .gz) or .parquet"
_BOM = b"\xef\xbb\xbf"

# A record with its place, or the error of a line that holds none.
_Record = tuple[str, Any] | ExampleError


def read_examples(
    paths: PathLike | Sequence[PathLike], fields: Fields = DEFAULT_FIELDS, *, on_error: OnError = "raise"
) -> tuple[list[Example], list[ExampleError]]:
    """Read the examples of one file or of several, in order, and the errors of the rows that were skipped.

    Files end in `.jsonl`, `.json` (a list of objects, an object with one list under 'data' or 'rows', or JSON
    lines after all), either with `.gz`, or `.parquet`. Text is UTF-8, with or without a byte order mark. For
    the forms of a row see `to_example`.

    Args:
        paths: one file, or a list of files.
        fields: the names of the columns.
        on_error: 'raise' stops at the first row that cannot be used; 'skip' leaves such rows out.

    Raises:
        ExampleError: a row cannot be used, and `on_error` is 'raise'.
        ValueError: a file is missing, truncated, empty or of an unknown format, whatever `on_error` is.
    """
    check_on_error(on_error)
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    is_list = isinstance(paths, (list, tuple))
    if not is_list or not all(isinstance(path, (str, os.PathLike)) for path in paths):
        problem = f"paths should be the path of a file or a list of paths, but it is {describe_value(paths)}"
        raise TypeError(f"{problem}: name a file.")
    if not paths:
        raise ValueError("paths should hold at least one file, but it is an empty list: name a file.")
    files = list(map(Path, paths))
    examples: list[Example] = []
    errors: list[ExampleError] = []
    for path in files:
        # The file's name reads best, unless another file of the same name is read as well.
        name = path.name if sum(path.name == other.name for other in files) == 1 else str(path)
        count = 0
        for record in _read_records(path, name, fields):
            count += 1
            with collect_errors(errors, on_error):
                if isinstance(record, ExampleError):
                    raise record
                source, values = record
                examples.append(to_example(values, fields, source))
        if not count:
            raise ValueError(f"{name}: the file should have rows, but it is empty: add rows or name another.")
    return examples, errors


def _read_records(path: Path, name: str, fields: Fields) -> Iterator[_Record]:
    """The records of a file, each with its place, which begins with `name`."""
    if path.is_dir():
        files = sorted(item.name for item in path.iterdir() if item.name.lower().endswith(_ENDINGS))
        hint = f"for instance '{path / files[0]}'" if files else _KNOWN_ENDINGS
        raise ValueError(f"the path should be a file, but it is the folder '{path}': name the file, {hint}.")
    if not path.exists():
        raise ValueError(f"the path should be a file, but '{path}' does not exist: check the path.")
    if not path.name.lower().endswith(_ENDINGS):
        problem = f"the ending of the file should say its format, but the file is '{path}'"
        raise ValueError(f"{problem}: name {_KNOWN_ENDINGS}.")
    is_parquet = path.name.lower().endswith(".parquet")
    return _read_parquet(path, name) if is_parquet else _read_text(path, name, fields)


def _read_text(path: Path, name: str, fields: Fields) -> Iterator[_Record]:
    """The records of JSON or JSON lines, through gzip if the first bytes of the file say so."""
    try:
        with open(path, "rb") as raw:
            is_packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            file = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if is_packed else raw
            is_lines = path.name.lower().endswith((".jsonl", ".jsonl.gz"))
            yield from _read_json_lines(file, name) if is_lines else _read_json(file, name, fields)
    except EOFError as error:
        problem = f"{name}: the gzip data should be whole, but the file is truncated"
        raise ValueError(f"{problem}: fetch or write it again.") from error
    except (OSError, zlib.error) as error:
        problem = f"{name}: the file should be readable, but reading it gives '{error}'"
        raise ValueError(f"{problem}: check its permissions, or fetch or write it again.") from error


def _read_json_lines(file: IO[bytes], name: str) -> Iterator[_Record]:
    # Only b"\n" ends a line: JSON strings may hold U+2028 and others that str.splitlines splits at.
    for number, line in enumerate(file, 1):
        # A line break at the end would put the column of an error on a line of its own.
        line = (line.removeprefix(_BOM) if number == 1 else line).rstrip()
        if not line:
            continue
        try:
            yield f"{name}, line {number}", _parse_json(_decode(line, name, number), name, number)
        except ExampleError as error:
            yield error


def _read_json(file: IO[bytes], name: str, fields: Fields) -> Iterator[_Record]:
    data = file.read().removeprefix(_BOM)
    if not data.strip():
        return
    try:
        document = _parse_json(_decode(data, name), name)
    except ExampleError as error:
        cause = error.__cause__
        if not (isinstance(cause, json.JSONDecodeError) and cause.msg == "Extra data"):
            raise
        # Several values one after the other are JSON lines under another name.
        yield from _read_json_lines(io.BytesIO(data), name)
        return
    if isinstance(document, dict) and {fields.chosen, "completions", "completion"} & document.keys():
        yield f"{name}, line 1", document
        return
    values = [document.get("data"), document.get("rows")] if isinstance(document, dict) else [document]
    lists = [value for value in values if isinstance(value, list)]
    if len(lists) != 1:
        form = "a list of objects, or an object with one list under 'data' or 'rows'"
        problem = f"the file should hold {form}, but it holds {describe_value(document)}"
        raise ValueError(f"{name}: {problem}: write the rows as one list.")
    for number, record in enumerate(lists[0], 1):
        yield f"{name}, row {number}", record


def _decode(data: bytes, name: str, line: int | None = None) -> str:
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
        if isinstance(error, json.JSONDecodeError):
            place = f"{name}, line {line or error.lineno}, column {error.colno}"
            problem = f"broken JSON ({error.msg})"
        else:  # numbers of thousands of digits, thousands of brackets
            place = f"{name}, line {line}" if line else name
            problem = f"JSON beyond limits ({error})"
        raise ExampleError(f"{form}, but it is {problem}: {remedy}.", source=place) from error


def _read_parquet(path: Path, name: str) -> Iterator[_Record]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("reading Parquet needs pyarrow: pip install 'dpo-wrapper[train]'.") from error
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{name}, row {number}", record
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        place = f"{name}, after row {number}" if number else name
        problem = f"{place}: the file should be Parquet, but reading it gives '{reason}'"
        raise ValueError(f"{problem}: write or fetch it again.") from error
