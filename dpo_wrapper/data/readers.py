"""Preference files -> records with their places -> examples."""

import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from dpo_wrapper.data.comparison import TiedRowError
from dpo_wrapper.data.errors import ExampleError, OnError, check_on_error, collect_errors, describe_value
from dpo_wrapper.data.examples import DEFAULT_FIELDS, Example, Fields
from dpo_wrapper.data.files import JSON_LINES, PathLike, Source, find_sources, open_packed
from dpo_wrapper.data.forms import ROW_KEYS
from dpo_wrapper.data.json_records import RawLine, Record, read_json, read_raw_lines
from dpo_wrapper.data.normalize import needed_columns, parse_split, to_example
from dpo_wrapper.data.row import Row
from dpo_wrapper.data.table_records import read_table


@dataclass(frozen=True)
class ReadExamples:
    """The examples of files, and what was seen on the way.

    Attributes:
        errors: of the rows that were skipped.
        num_rows: rows read, whatever became of them.
        num_tied: rows left out because no completion is better than another.
        forms: how many rows had each form.
        unused_columns: how many rows have a value in a column that nothing used.
    """

    examples: list[Example] = field(default_factory=list)
    errors: list[ExampleError] = field(default_factory=list)
    num_rows: int = 0
    num_tied: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    unused_columns: Counter[str] = field(default_factory=Counter)

    def notes(self) -> list[str]:
        """Sentences on rows that were left out, on columns, and on what gives the better side away."""
        notes = []
        if self.errors:
            notes.append(
                f"{len(self.errors):,} rows could not be read and are left out; the first: {self.errors[0]}"
            )
        if self.num_tied:
            notes.append(f"{self.num_tied:,} rows without a better completion are left out.")
        if self.unused_columns:
            notes.append("Columns that were not used: " + ", ".join(sorted(self.unused_columns)) + ".")
        if count := sum(example.margin is not None for example in self.examples):
            notes.append(
                f"{count:,} rows have a margin, which the loss takes as nats by which chosen should win "
                "(--columns margin= ignores it)."
            )
        if (side := find_blank_side(self.examples)) is not None:
            notes.append(
                f"Every {side} completion begins with white space and no other does, which gives them away: "
                "strip them all."
            )
        return notes


def find_blank_side(examples: Sequence[Example]) -> str | None:
    """The side of pairs that begins with white space in every row while the other never does, if one does."""
    pairs = [example.completions for example in examples if len(example.completions) == 2]
    texts = [pair for pair in pairs if all(isinstance(text, str) and text.strip() for text in pair)]
    blanks = {tuple(str(text)[0].isspace() for text in pair) for pair in texts}
    if len(texts) < 2 or len(blanks) != 1 or blanks <= {(True, True), (False, False)}:
        return None
    return "chosen" if (True, False) in blanks else "rejected"


def read_examples(
    paths: PathLike | Sequence[PathLike],
    fields: Fields = DEFAULT_FIELDS,
    *,
    split: str | None = None,
    on_error: OnError = "raise",
) -> ReadExamples:
    """Read the examples of files, in order.

    Files end in `.jsonl` or `.ndjson`, `.json` (a list of objects, an object with one list under 'data' or
    'rows', objects one after another, or columns), `.csv` or `.tsv`, any of them packed with gzip, bz2, xz or
    zstd, `.parquet` or `.arrow`. Text is UTF-8, with or without a byte order mark. A path may also be a
    folder of such files, a pattern like `data/*.jsonl`, a folder that `datasets` has saved, or the name of a
    data set on the hub. For the forms of a row see `to_example`.

    Args:
        paths: one path, or a list of them.
        fields: the names of the columns.
        split: the split to read of data sets that have several; by default all.
        on_error: 'raise' stops at the first row that cannot be used; 'skip' leaves such rows out.

    Raises:
        ExampleError: a row cannot be used, and `on_error` is 'raise'.
        ValueError: a file is missing, truncated, empty or of an unknown format, or no row has a column that
            is named, whatever `on_error` is.
    """
    check_on_error(on_error)
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    is_list = isinstance(paths, (list, tuple))
    if not is_list or not all(isinstance(path, (str, os.PathLike)) for path in paths):
        problem = f"paths should be the path of a file or a list of paths, but it is {describe_value(paths)}"
        raise TypeError(f"{problem}: name a file.")
    if not paths:
        raise ValueError("paths should hold at least one file, but it is an empty list: name a file.")
    result = ReadExamples()
    num_rows = num_tied = 0
    missing = {name: column for name, column in fields.renamed.items() if column}
    for source in find_sources(paths):
        count = 0
        for content, own_split in read_raw_records(source, fields, split):
            count += 1
            record = content.parse() if isinstance(content, RawLine) else content
            with collect_errors(result.errors, on_error):
                if isinstance(record, ExampleError):
                    raise record
                place, values = record
                row = Row(values, fields.renamed, place)
                missing = {name: column for name, column in missing.items() if not row.has_column(column)}
                try:
                    example = to_example(row, fields, place)
                except TiedRowError:
                    num_tied += 1
                    continue
                if own_split is not None and example.split is None:
                    example = replace(example, split=parse_split(own_split, "split"))
                result.examples.append(example)
                result.forms[example.form] += 1
                result.unused_columns.update(row.unused())
        if not count:
            problem = f"{source.name}: the file should have rows, but it is empty"
            raise ValueError(f"{problem}: add rows or name another.")
        num_rows += count
    for name, column in missing.items():
        problem = f"a column that is named should be in the data, but no row has '{column}' for {name}"
        raise ValueError(f"{problem}: correct the name, or leave it out.")
    return replace(result, num_rows=num_rows, num_tied=num_tied)


def read_raw_records(
    source: Source, fields: Fields, split: str | None = None
) -> Iterator[tuple[RawLine | Record, str | None]]:
    """The records of a source, with the split that each belongs to if the source says so.

    Lines of JSON are not parsed yet.
    """
    if source.kind not in (*JSON_LINES, ".json"):
        needed = needed_columns(fields)
        numbers = {fields.weight, fields.margin}
        yield from read_table(source, needed.__contains__, numbers, split)
        return
    name = source.name
    try:
        with open(source.path, "rb") as raw:
            file = open_packed(raw)
            if source.kind in JSON_LINES:
                yield from ((line, source.split) for line in read_raw_lines(file, name))
            else:
                records = read_json(file, name, {fields.chosen, *ROW_KEYS})
                yield from ((record, source.split) for record in records)
    except EOFError as error:
        problem = f"{name}: the packed data should be whole, but the file is truncated"
        raise ValueError(f"{problem}: fetch or write it again.") from error
    except (OSError, zlib.error) as error:
        problem = f"{name}: the file should be readable, but reading it gives '{error}'"
        raise ValueError(f"{problem}: check its permissions, or fetch or write it again.") from error
