"""What a process makes of a part of the rows: examples as Arrow, measures of them, and counts."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dpo_wrapper.data.convert import convert_examples
from dpo_wrapper.data.errors import ExampleError, OnError, collect_errors
from dpo_wrapper.data.example_table import ExampleTable, TableRow, make_batch, write_batches
from dpo_wrapper.data.examples import PREFERENCE_TYPES, DatasetType, Example, Fields, Kind
from dpo_wrapper.data.lint import measure_rows
from dpo_wrapper.data.prepare.parts import Part, RawRow, name_place
from dpo_wrapper.data.readers import RecordParser
from dpo_wrapper.data.rows.comparison import LeftOutError, TiedRowError
from dpo_wrapper.data.tokens.encode import TokenizedRow, tokenize_row
from dpo_wrapper.data.tokens.options import TokenizeOptions
from dpo_wrapper.data.tokens.tokenizers import Tokenizer
from dpo_wrapper.data.whole_files import write_whole


@dataclass
class PartCounts:
    """What became of the rows of a part, or of several.

    Attributes:
        num_rows: rows that were read.
        num_bad: rows that cannot be used.
        num_tied: rows none of whose completions is better than another.
        num_ignored_spans, forms, unused_columns: as in `ReadExamples`.
        refused: file, line, field and reason of each row that is left out, whether bad or without use.
        missing_columns: for columns that are named the number of parts that have none of them.
        tokens: what was cut, by the names of `TokenizedExamples`.
        longest, largest_id: of all sequences that are written.
    """

    num_rows: int = 0
    num_bad: int = 0
    num_tied: int = 0
    num_ignored_spans: int = 0
    refused: list[dict[str, Any]] = field(default_factory=list)
    forms: Counter[str] = field(default_factory=Counter)
    unused_columns: Counter[str] = field(default_factory=Counter)
    missing_columns: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    longest: int = 0
    largest_id: int = -1

    def add(self, other: "PartCounts") -> None:
        for name, value in vars(other).items():
            mine = vars(self)[name]
            vars(self)[name] = max(mine, value) if name in ("longest", "largest_id") else mine + value


@dataclass(frozen=True)
class PartMaker:
    """Makes the files of a part: `part-000007.arrow`, `.npz` with measures and, last, `.json` with counts.

    Args:
        folder: where the files are written.
        tokenizer, options: of the tokens.
        fields, kind: as in `read_examples`.
        families: of the rows of each source, for the kind 'auto'.
        on_error: 'raise' raises the first error of a row.
    """

    folder: Path
    tokenizer: Tokenizer
    options: TokenizeOptions
    fields: Fields
    kind: Kind
    families: Sequence[DatasetType | None]
    on_error: OnError

    def make(self, part: Part) -> PartCounts:
        """Write the files of a part.

        Raises:
            ExampleError: a row cannot be used, and `on_error` is 'raise'.
        """
        counts = PartCounts()
        measured: list[tuple[Example, Any]] = []
        row_numbers: list[int] = []
        parsers: dict[int, RecordParser] = {}
        for number, raw in enumerate(part.rows):
            if raw.source_number not in parsers:
                family = self.families[raw.source_number]
                parsers[raw.source_number] = RecordParser(self.fields, self.kind, "raise", family)
            for example, row in self.make_row(raw, parsers[raw.source_number], counts):
                measured.append((example, row.examples))
                row_numbers.append(number)
        for parser in parsers.values():
            counts.num_ignored_spans += parser.counts["num_ignored_spans"]
            counts.forms += parser.forms
            counts.unused_columns += parser.unused_columns
        counts.missing_columns.update(set.intersection(*(set(one.missing) for one in parsers.values())))
        arrays = measure_rows(measured)
        digests = arrays["prompt_digest"].tolist()
        table_rows = [
            TableRow(piece, example.split, digest)
            for (example, pieces), digest in zip(measured, digests, strict=True)
            for piece in pieces
        ]
        table = ExampleTable([make_batch(table_rows)])
        counts.longest, counts.largest_id = int(max(table.lengths(), default=0)), table.largest_id
        write_batches(part_file(self.folder, part.number, "arrow"), table.record_batches)
        arrays["row"] = np.array(row_numbers, np.int32)
        arrays["num_examples"] = np.array([len(pieces) for _, pieces in measured], np.int32)
        np.savez(part_file(self.folder, part.number, "npz"), **arrays)  # type: ignore[arg-type]
        write_whole(part_file(self.folder, part.number, "json"), json.dumps(vars(counts)))
        return counts

    def make_row(
        self, raw: RawRow, parser: RecordParser, counts: PartCounts
    ) -> list[tuple[Example, TokenizedRow]]:
        """The examples of a row with their tokens; none for a row that is refused, which is counted."""
        counts.num_rows += 1
        try:
            rows, reason = self._tokenize(parser.to_example(raw.content, raw.split))
        except LeftOutError as error:
            rows, reason = [], str(error)
            counts.num_tied += isinstance(error, TiedRowError)
        except ExampleError as error:
            error.source = error.source or raw.place
            if self.on_error == "raise":
                raise
            counts.num_bad += 1
            counts.refused.append(name_place(error))
            return []
        if not rows:
            counts.refused.append(name_place(ExampleError(reason, source=raw.place)))
        for _, row in rows:
            counts.tokens.update(row.counts)
        return rows

    def _tokenize(self, example: Example) -> tuple[list[tuple[Example, TokenizedRow]], str]:
        """The examples that an example becomes, with their tokens, and the reason why there are none."""
        examples, rows, reason = [example], [], ""
        if self.kind in PREFERENCE_TYPES:
            examples, _ = convert_examples(examples, self.kind)
        for converted in examples:
            with collect_errors([], "raise", example.source):
                row = tokenize_row(converted, self.tokenizer, self.options)
            if row.examples:
                rows.append((converted, row))
            reason = row.refusal or reason
        return rows, reason


def part_file(folder: Path, number: int, ending: str) -> Path:
    return folder / f"part-{number:06}.{ending}"


def is_written(folder: Path, number: int) -> bool:
    """Whether all files of a part are there: its counts are written last."""
    return part_file(folder, number, "json").is_file()


def read_counts(folder: Path, number: int) -> PartCounts | None:
    """The counts of a part; None if its files are not written yet."""
    if not is_written(folder, number):
        return None
    content = json.loads(part_file(folder, number, "json").read_text(encoding="utf-8"))
    for name in ("forms", "unused_columns", "missing_columns", "tokens"):
        content[name] = Counter(content[name])
    return PartCounts(**content)
