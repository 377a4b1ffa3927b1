"""A table of a run's metrics, before and after."""

import math
from collections.abc import Sequence
from typing import Any

from dpo_wrapper.metrics import VALID_COUNTS, format_metric

Record = dict[str, Any]

TABLE_ROWS = (
    ("reward accuracy", "rewards/accuracies", "{:.1%}"),
    ("  standard error", "accuracy/standard_error", "{:.1%}"),
    ("reward margin", "rewards/margins", "{:.3f}"),
    ("exact answers", "exact_answers", "{:.1%}"),
    ("  standard error", "exact_answers/standard_error", "{:.1%}"),
    ("loss", "loss", "{:.4f}"),
    ("log-prob of chosen", "logps/chosen", "{:.2f}"),
    ("log-prob of rejected", "logps/rejected", "{:.2f}"),
    ("pairs", "pairs/valid", "{:.0f}"),
    ("lists", "lists/valid", "{:.0f}"),
    ("rows", "rows/valid", "{:.0f}"),
)
"""Label, metric and format of each row of the table."""


def select_records(records: Sequence[Record], part: str) -> list[Record]:
    """The records of one part: step, eval or train."""
    return [record for record in records if record["part"] == part]


def list_before_and_after(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Eval and train metrics before and after a stage of training, from its records.

    Returns headings of the columns, and rows with a label and a value for each of them.
    """
    records = [record | estimate_standard_errors(record) for record in records]
    columns: list[tuple[str, Record]] = []
    for part in ("eval", "train"):
        if selected := select_records(records, part):
            columns += [(f"{part} before", selected[0]), ("after", selected[-1])]
    rows = []
    for label, metric, template in TABLE_ROWS:
        if any(metric in record for _, record in columns):
            values = [record.get(metric) for _, record in columns]
            cells = ["-" if value is None else format_metric(template, value) for value in values]
            rows.append([label, *cells])
    return [heading for heading, _ in columns], rows


def format_before_and_after(records: Sequence[Record]) -> str:
    """The table of `list_before_and_after` as text."""
    headings, rows = list_before_and_after(records)
    return align_columns([["", *headings], *rows])


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """A table with a line below its first row: the first column to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for label, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *padded]).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def estimate_standard_errors(record: Record) -> Record:
    """The standard errors of shares as those of independent pairs (lists, rows), and of prompts.

    Where all or none are right, it would be 0, and says nothing: then there is none.
    """
    num_examples = next((record[name] for name in VALID_COUNTS if record.get(name)), None)
    shares = {
        "accuracy": (record.get("rewards/accuracies"), num_examples),
        "exact_answers": (record.get("exact_answers"), record.get("exact_answers/prompts")),
    }
    return {
        f"{name}/standard_error": math.sqrt(share * (1 - share) / count)
        for name, (share, count) in shares.items()
        if share is not None and 0 < share < 1 and count
    }
