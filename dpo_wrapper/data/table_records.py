"""The records of tables: Parquet, Arrow, CSV, and data sets that `datasets` has saved or the hub holds."""

import csv
import io
from collections.abc import Callable, Iterator
from typing import Any

from dpo_wrapper.data.errors import ExampleError, describe_value
from dpo_wrapper.data.files import Source, import_pyarrow, open_packed
from dpo_wrapper.data.json_records import Record, decode
from dpo_wrapper.libraries.error_text import summarize_error

IsNeeded = Callable[[str], bool]
"""Whether a column is read; others may hold what Python has no value for, such as far dates."""


def read_table(
    source: Source, is_needed: IsNeeded, numbers: set[str], split: str | None
) -> Iterator[tuple[Record, str | None]]:
    """The records of a table with the split that each belongs to, if the source says so.

    Columns that are not needed are told by their names, and their values are not read. CSV has text alone, of
    which the columns `numbers` are read as numbers. Its rows of another number of cells are errors.
    """
    pa = import_pyarrow()
    number, is_text = 0, source.kind in (".csv", ".tsv")
    torn: dict[int, str] = {}
    try:
        for batch, name in _read_batches(source, split, torn):
            names = batch.schema.names
            if double := next((column for column in names if names.count(column) > 1), None):
                problem = f"the columns should have different names, but '{double}' stands twice"
                raise ValueError(f"{source.name}: {problem}: rename one of the two.")
            needed = [column for column in batch.schema.names if is_needed(column)]
            others = {column: UNREAD for column in batch.schema.names if column not in needed}
            rows = batch.select(needed).to_pylist() if needed else [{}] * batch.num_rows
            for values in rows:
                number += 1
                while number in torn:
                    yield _torn_row(source, number, torn.pop(number)), name
                    number += 1
                if is_text:
                    values = {k: _parse_cell(v, k in numbers) for k, v in values.items()}
                yield (f"{source.name}, row {number}", values | others), name
        for last, wrong in sorted(torn.items()):
            yield _torn_row(source, last, wrong), source.split
    except (pa.ArrowException, OSError, UnicodeDecodeError, csv.Error) as error:
        reason = summarize_error(error)
        place = f"{source.name}, after row {number}" if number else source.name
        kind = {".parquet": "Parquet", ".arrow": "Arrow"}.get(source.kind, "a table")
        problem = f"{place}: the file should be {kind}, but reading it gives '{reason}'"
        raise ValueError(f"{problem}: write or fetch it again.") from error


def _torn_row(source: Source, number: int, problem: str) -> ExampleError:
    remedy = "correct the commas and quotes" if source.kind == ".csv" else "correct the tabs and quotes"
    return ExampleError(f"{problem}: {remedy}.", source=f"{source.name}, row {number}")


UNREAD = type("Unread", (), {"__repr__": lambda self: "a value that was not read"})()
"""Stands for a value in a column that no form uses."""


def _read_batches(
    source: Source, split: str | None, torn: dict[int, str]
) -> Iterator[tuple[Any, str | None]]:
    """Batches of rows; what is wrong with rows of another number of cells goes to `torn`."""
    pa = import_pyarrow()
    if source.kind in ("saved", "hub"):
        yield from _read_datasets(source, split)
    elif source.kind == ".parquet":
        with pa.parquet.ParquetFile(source.path) as file:
            for group in range(file.num_row_groups):
                yield from ((batch, source.split) for batch in file.iter_batches(row_groups=[group]))
    elif source.kind == ".arrow":
        with open(source.path, "rb") as raw:
            is_file = raw.read(6) == b"ARROW1"
            raw.seek(0)
            if is_file:
                reader = pa.ipc.open_file(raw)
                yield from ((reader.get_batch(k), source.split) for k in range(reader.num_record_batches))
            else:
                yield from ((batch, source.split) for batch in pa.ipc.open_stream(raw))
    else:
        with open(source.path, "rb") as raw:
            text = open_packed(raw).read()
        decoded = decode(text, source.name).removeprefix("\ufeff")  # tells the place of what is no UTF-8

        def note(row: Any) -> str:
            cells = f"{row.expected_columns} cells as the first row, but it has {row.actual_columns}"
            torn[row.number - 1] = f"the row should have {cells}"
            return "skip"

        delimiter = "\t" if source.kind == ".tsv" else ","
        # pa.csv.open_csv leaves a thread behind, which may abort the process at its end
        lines = csv.reader(io.StringIO(decoded, newline=None), delimiter=delimiter)
        names = next(filter(None, lines), [])
        parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note)
        read = pa.csv.ReadOptions(use_threads=False)
        _check_separator(source, names, delimiter)
        convert = pa.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            strings_can_be_null=True, null_values=[""], quoted_strings_can_be_null=False,
        )  # fmt: skip
        table = pa.csv.read_csv(
            pa.BufferReader(text), read_options=read, parse_options=parse, convert_options=convert
        )
        yield from ((batch, source.split) for batch in table.to_batches())


def _check_separator(source: Source, names: list[str], delimiter: str) -> None:
    """Raise ValueError if the first line of a file has another separator and is one column therefore."""
    if len(names) == 1 and (others := set(names[0]) & set(",;|\t") - {delimiter}):
        kind = "commas" if delimiter == "," else "tabs"
        problem = f"the columns should be separated by {kind}, but the first line has {min(others)!r} instead"
        raise ValueError(f"{source.name}: {problem} ({describe_value(names[0])}): write it with {kind}.")


def _read_datasets(source: Source, split: str | None) -> Iterator[tuple[Any, str | None]]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("reading this needs datasets: pip install 'dpo-wrapper[train]'.") from error
    try:
        is_saved = source.kind == "saved"
        loaded = datasets.load_from_disk(source.path) if is_saved else datasets.load_dataset(source.path)
    except Exception as error:  # many kinds, by what is missing
        reason = summarize_error(error)
        problem = f"'{source.path}' should be a file, a folder or a data set on the hub"
        raise ValueError(f"{problem}, but it cannot be read ({reason}): check the name.") from error
    parts = dict(loaded) if isinstance(loaded, dict) else {None: loaded}
    if split is not None:
        if split not in parts:
            known = ", ".join(map(str, parts))
            raise ValueError(f"split should be one of {known}, but it is '{split}': name one of them.")
        parts = {split: parts[split]}
    for name, part in parts.items():
        for table in part.with_format("arrow").iter(batch_size=1000):
            yield from ((batch, name) for batch in table.to_batches())


def _parse_cell(text: str | None, is_number: bool) -> Any:
    """A cell of a CSV file: text, or a number where one is expected."""
    try:
        return float(text) if text is not None and is_number else text
    except ValueError:
        return text
