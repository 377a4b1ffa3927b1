"""Files -> records with their places -> examples."""

import os
import zlib
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dpo_wrapper.data.errors import ExampleError, OnError, check_on_error, collect_errors, describe_value
from dpo_wrapper.data.examples import (
    DATASET_TYPES,
    DEFAULT_FIELDS,
    DatasetType,
    Example,
    Fields,
    Kind,
    find_family,
)
from dpo_wrapper.data.files import JSON_LINES, PathLike, Source, check_packed, find_sources, open_packed
from dpo_wrapper.data.json_records import RawLine, Record, read_json, read_raw_lines
from dpo_wrapper.data.rows.comparison import LeftOutError
from dpo_wrapper.data.rows.forms import ROW_KEYS
from dpo_wrapper.data.rows.normalize import needed_columns, parse_split, to_example
from dpo_wrapper.data.rows.row import Row
from dpo_wrapper.data.rows.supervised import SPANS
from dpo_wrapper.data.table_records import read_table


@dataclass(frozen=True)
class ReadExamples:
    """The examples of files, and what was seen on the way.

    Attributes:
        errors: of the rows that were skipped.
        num_rows: rows read, whatever became of them.
        num_tied: rows left out because no completion is better than another.
        num_undesirable: rows left out because their only completion is undesirable, so not to be imitated.
        num_ignored_spans: rows whose `loss_masking_spans` have no meaning for their kind.
        forms: how many rows had each form.
        unused_columns: how many rows have a value in a column that nothing used.
    """

    examples: list[Example] = field(default_factory=list)
    errors: list[ExampleError] = field(default_factory=list)
    num_rows: int = 0
    num_tied: int = 0
    num_undesirable: int = 0
    num_ignored_spans: int = 0
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
        if self.num_undesirable:
            notes.append(f"{self.num_undesirable:,} rows with an undesirable completion are left out.")
        if self.num_ignored_spans:
            notes.append(format_ignored_spans(self.num_ignored_spans))
        if self.unused_columns:
            notes.append("Columns that were not used: " + ", ".join(sorted(self.unused_columns)) + ".")
        if count := sum(example.margin is not None for example in self.examples):
            notes.append(format_margins(count))
        if (side := find_blank_side(self.examples)) is not None:
            notes.append(
                f"Every {side} completion begins with white space and no other does, which gives them away: "
                "strip them all."
            )
        return notes


def format_margins(count: int) -> str:
    meaning = "which the loss takes as nats by which chosen should win (--columns margin= ignores it)"
    return f"{count:,} rows have a margin, {meaning}."


def format_ignored_spans(count: int) -> str:
    return f"{count:,} rows have {SPANS}, which are ignored: only a text of prompt_completion has them."


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
    kind: Kind = "preference",
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
        kind: what the rows are, as in `to_example`; 'auto' finds it out from the first row of each file that
            can be used, and refuses rows of another kind in the same file.

    Raises:
        ExampleError: a row cannot be used, and `on_error` is 'raise'.
        ValueError: a file is missing, truncated, empty or of an unknown format, or no row has a column that
            is named, whatever `on_error` is.
    """
    check_on_error(on_error)
    check_kind(kind)
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    is_list = isinstance(paths, (list, tuple))
    if not is_list or not all(isinstance(path, (str, os.PathLike)) for path in paths):
        problem = f"paths should be the path of a file or a list of paths, but it is {describe_value(paths)}"
        raise TypeError(f"{problem}: name a file.")
    if not paths:
        raise ValueError("paths should hold at least one file, but it is an empty list: name a file.")
    parser = RecordParser(fields, kind, on_error)
    for source in find_sources(paths):
        parser.family, num_before = None, parser.counts["num_rows"]
        for content, own_split in read_raw_records(source, fields, split):
            parser.parse(content, own_split)
        if parser.counts["num_rows"] == num_before:
            problem = f"{source.name}: the file should have rows, but it is empty"
            raise ValueError(f"{problem}: add rows or name another.")
    for name in parser.missing:
        raise missing_column_error(name, fields)
    return parser.result


def missing_column_error(name: str, fields: Fields) -> ValueError:
    """The error of a column that is named and that no row has."""
    column = fields.renamed[name]
    problem = f"a column that is named should be in the data, but no row has '{column}' for {name}"
    return ValueError(f"{problem}: correct the name, or leave it out.")


class RecordParser:
    """Makes examples of the records of a file, and counts what it sees.

    Args:
        fields, kind, on_error: as in `read_examples`.
        family: the family of the file's rows for the kind 'auto'; by default that of the first usable row.

    Attributes:
        missing: columns that are named and that no record has had, by their usual names.
    """

    def __init__(
        self, fields: Fields, kind: Kind, on_error: OnError, family: DatasetType | None = None
    ) -> None:
        self.fields, self.kind, self.on_error, self.family = fields, kind, on_error, family
        self.missing = {name: column for name, column in fields.renamed.items() if column}
        self.examples: list[Example] = []
        self.errors: list[ExampleError] = []
        self.counts: Counter[str] = Counter()
        self.forms: Counter[str] = Counter()
        self.unused_columns: Counter[str] = Counter()

    @property
    def result(self) -> ReadExamples:
        """What has been read until now."""
        return ReadExamples(
            self.examples,
            self.errors,
            forms=self.forms,
            unused_columns=self.unused_columns,
            **dict[str, Any](self.counts),
        )

    def parse(self, content: RawLine | Record, own_split: str | None = None) -> None:
        """Add the example of the next record to `result`, or count why there is none.

        Args:
            content: the record's place and its values, the error of reading it, or a line that holds it.
            own_split: the split that the record belongs to if it does not say so itself.

        Raises:
            ExampleError: the record cannot be used, and `on_error` is 'raise'.
        """
        with collect_errors(self.errors, self.on_error):
            try:
                self.examples.append(self.to_example(content, own_split))
            except LeftOutError as error:
                self.counts[error.count] += 1

    def to_example(self, content: RawLine | Record, own_split: str | None = None) -> Example:
        """The example of the next record; arguments as for `parse`.

        Raises:
            ExampleError: the record cannot be used.
            LeftOutError: it teaches nothing.
        """
        self.counts["num_rows"] += 1
        record = content.parse() if isinstance(content, RawLine) else content
        if isinstance(record, ExampleError):
            raise record
        place, values = record
        row = Row(values, self.fields.renamed, place)
        if self.missing:
            self.missing = {n: column for n, column in self.missing.items() if not row.has_column(column)}
        example = to_example(row, self.fields, place, self.kind)
        self._check_family(example)
        if own_split is not None and example.split is None:
            example = replace(example, split=parse_split(own_split, "split"))
        if not row.has_used(SPANS) and SPANS in row:
            self.counts["num_ignored_spans"] += 1
            row.used.add(row.column(SPANS))
        self.forms[example.form] += 1
        self.unused_columns.update(row.unused())
        return example

    def _check_family(self, example: Example) -> None:
        """The first example says what the others of a file are, where `kind` does not."""
        if self.kind != "auto":
            return
        family = find_family(example.dataset_type)
        self.family = self.family or family
        if family != self.family:
            problem = f"a file should hold rows of one kind, but this one holds {self.family} before"
            remedy = "write them into two files, or force one kind with --kind"
            raise ExampleError(f"{problem} and {family} in this row: {remedy}.", source=example.source)


def check_kind(kind: Any) -> None:
    if kind != "auto" and kind not in DATASET_TYPES:
        known = ", ".join(DATASET_TYPES)
        raise ValueError(f"kind should be 'auto' or one of {known}, but it is {kind!r}: choose one of them.")


def read_raw_records(
    source: Source, fields: Fields, split: str | None = None
) -> Generator[tuple[RawLine | Record, str | None], None, None]:
    """The records of a source, with the split that each belongs to if the source says so.

    Lines of JSON are not parsed yet.
    """
    if split is not None and source.kind not in ("saved", "hub"):
        problem = f"--split should name a split of a data set that has several, but {source.name} is a file"
        raise ValueError(f"{problem}: leave it out, and name the files of the split.")
    if source.kind not in (*JSON_LINES, ".json"):
        needed = needed_columns(fields)
        numbers = {fields.weight, fields.margin}
        yield from read_table(source, needed.__contains__, numbers, split)
        return
    name = source.name
    try:
        with open(source.path, "rb") as raw:
            if (file := open_packed(raw)) is raw:
                check_packed(raw, name)
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
