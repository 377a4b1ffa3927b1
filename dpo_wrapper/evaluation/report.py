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


def format_before_and_after(records: Sequence[Record]) -> str:
    """A table of the eval and train metrics before and after a stage of training, from its records."""
    records = [record | estimate_standard_error(record) for record in records]
    columns: list[tuple[str, Record]] = []
    for part in ("eval", "train"):
        if selected := select_records(records, part):
            columns += [(f"{part} before", selected[0]), ("after", selected[-1])]
    rows = [["", *(heading for heading, _ in columns)]]
    for label, metric, template in TABLE_ROWS:
        if any(metric in record for _, record in columns):
            values = [record.get(metric) for _, record in columns]
            rows.append(
                [label, *("-" if value is None else format_metric(template, value) for value in values)]
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for label, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *padded]).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def estimate_standard_error(record: Record) -> Record:
    """The standard error of the reward accuracy as that of a share of independent pairs (lists, rows)."""
    accuracy = record.get("rewards/accuracies")
    count = next((record[name] for name in VALID_COUNTS if record.get(name)), None)
    if accuracy is None or count is None:
        return {}
    return {"accuracy/standard_error": math.sqrt(accuracy * (1 - accuracy) / count)}
