"""File formats: JSON lines, JSON and Parquet, plain or gzipped, to records with their places."""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from .rows import Fields
from .turns import RowError, describe, names

ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
_KNOWN = "one that ends in .jsonl, .json (either with .gz) or .parquet"
_BOM = b"\xef\xbb\xbf"

# A record and its place, or the error that stands in its place.
Placed = tuple[str, Any] | RowError


def read_records(path: Path, name: str, fields: Fields) -> Iterator[Placed]:
    """The records of a file, each with its place, which starts with `name`.

    A line of JSON lines that cannot be read comes as the RowError it is; ValueError for a file that cannot
    be.
    """
    if path.is_dir():
        inside = sorted(item.name for item in path.iterdir() if item.name.lower().endswith(ENDINGS))
        hint = f"for instance '{path / inside[0]}'" if inside else _KNOWN
        raise ValueError(f"expected a file, got the folder '{path}'; name the file, {hint}")
    if not path.exists():
        raise ValueError(f"expected a file, got '{path}', which does not exist; check the path")
    ending = path.name.lower()
    if ending.endswith(".parquet"):
        return _parquet(path, name)
    ending = ending.removesuffix(".gz")
    if ending.endswith(".jsonl"):
        return _unpacked(path, name, lambda handle: _json_lines(handle, name))
    if ending.endswith(".json"):
        return _unpacked(path, name, lambda handle: _json_document(handle, name, fields))
    raise ValueError(f"expected a file whose ending says its format, got '{path}'; name {_KNOWN}")


def _unpacked(path: Path, name: str, read: Callable[[IO[bytes]], Iterator[Placed]]) -> Iterator[Placed]:
    """Reads a file, through gzip if its first bytes say so, and words what can go wrong with it."""
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            yield from read(cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if packed else raw)
    except EOFError as error:
        remedy = "fetch or write the file again"
        raise ValueError(f"{name}: expected whole gzip data, got a truncated file; {remedy}") from error
    except (OSError, zlib.error) as error:
        remedy = "check its permissions, or fetch or write it again"
        raise ValueError(f"{name}: expected a readable file, got '{error}'; {remedy}") from error


def _json_lines(handle: IO[bytes], name: str) -> Iterator[Placed]:
    # Only b"\n" ends a line: JSON strings may hold U+2028 and others that str.splitlines splits at.
    for number, line in enumerate(handle, 1):
        # A line break at the end would put the column of an error on a line of its own.
        line = (line.removeprefix(_BOM) if number == 1 else line).rstrip()
        if not line:
            continue
        try:
            yield f"{name}, line {number}", _parse(_decode(line, name, number), name, number)
        except RowError as error:
            yield error


def _json_document(handle: IO[bytes], name: str, fields: Fields) -> Iterator[Placed]:
    data = handle.read().removeprefix(_BOM)
    if not data.strip():
        return
    text = _decode(data, name)
    try:
        document = _parse(text, name)
    except RowError as error:
        cause = error.__cause__
        if not (isinstance(cause, json.JSONDecodeError) and cause.msg == "Extra data"):
            raise
        # Several values one after the other: JSON lines under another name.
        yield from _json_lines(io.BytesIO(data), name)
        return
    if isinstance(document, dict) and {fields.chosen, "completions", "completion"} & document.keys():
        yield f"{name}, line 1", document
        return
    if isinstance(document, dict):
        lists = [key for key in ("data", "rows") if isinstance(document.get(key), list)]
        wanted = "a list of objects, or an object with one list under 'data' or 'rows'"
        if len(lists) != 1:
            got = f"an object with {names(document)}"
            raise ValueError(f"{name}: expected {wanted}, got {got}; write the rows as one list")
        document = document[lists[0]]
    if not isinstance(document, list):
        raise ValueError(f"{name}: expected a list of objects, got {describe(document)}; write such a list")
    for number, record in enumerate(document, 1):
        yield f"{name}, row {number}", record


def _decode(data: bytes, name: str, line: int | None = None) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = line or data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        got = f"byte 0x{data[error.start]:02x} at byte {column} of the line"
        raise RowError(f"{name}, line {line}: expected UTF-8, got {got}; save the text as UTF-8") from error


def _parse(text: str, name: str, line: int | None = None) -> Any:
    """The JSON value of the text; RowError with line and column. `line` is that of a line of JSON lines."""
    wanted = "one JSON object per line" if line else "JSON"
    remedy = "correct it"
    if line and text.lstrip().startswith("["):
        remedy += ", or name the file .json if it is one JSON list"
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{name}, line {line or error.lineno}, column {error.colno}"
        raise RowError(f"{place}: expected {wanted}, got broken JSON ({error.msg}); {remedy}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        place = f"{name}, line {line}" if line else name
        raise RowError(f"{place}: expected {wanted}, got JSON beyond limits ({error}); {remedy}") from error


def _parquet(path: Path, name: str) -> Iterator[Placed]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("reading Parquet needs pyarrow: pip install 'dpo-wrapper[train]'") from error
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
        remedy = "write or fetch the file again"
        raise ValueError(f"{place}: expected a Parquet file, got '{reason}'; {remedy}") from error
