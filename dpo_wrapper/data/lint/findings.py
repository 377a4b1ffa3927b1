"""What a check of a data set says."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

FeatureMap = Mapping[str, NDArray[Any]]
Counts = Mapping[str, int]

MAX_ROWS = 5
"""Rows that a finding shows."""

MIN_ROWS = 50
"""Rows of a dataset type or of a side, below which shares say nothing and little can be learnt."""


@dataclass(frozen=True)
class Finding:
    """Something that a person should know of a data set.

    Attributes:
        name: of what was found, such as 'length_bias'.
        is_problem: whether something should be done; False for information.
        sentence: what was found, in counts and shares, and what to do about a problem.
        rows: indices of a few rows that show it.
        numbers: what the sentence says, for programs.
    """

    name: str
    is_problem: bool
    sentence: str
    rows: tuple[int, ...] = ()
    numbers: Mapping[str, float | str] = field(default_factory=dict)


Check = Callable[[FeatureMap, Counts], list[Finding]]


def make_finding(
    name: str,
    is_problem: bool,
    fact: str,
    remedy: str,
    rows: Iterable[Any] = (),
    numbers: Mapping[str, Any] | None = None,
) -> Finding:
    """A finding that names a remedy if it is a problem, with the first of the rows."""
    sentence = f"{fact}: {remedy}." if is_problem else f"{fact}."
    shown = tuple(int(row) for row, _ in zip(rows, range(MAX_ROWS), strict=False))
    plain = {key: as_plain(value) for key, value in (numbers or {}).items()}
    return Finding(name, bool(is_problem), sentence, shown, plain)


def as_plain(value: Any) -> Any:
    """A number of numpy as one of Python, which JSON can write."""
    return value.item() if hasattr(value, "item") else value


def count_rows(number: int, noun: str = "row") -> str:
    """'1 row', '2,000 rows'."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def format_findings(findings: Sequence[Finding]) -> str:
    """One line for each finding, problems first."""
    ordered = sorted(findings, key=lambda finding: not finding.is_problem)
    return "\n".join(f"{'problem:' if f.is_problem else 'note:':9}{f.sentence}" for f in ordered)
