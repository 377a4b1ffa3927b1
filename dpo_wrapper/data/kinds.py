"""Rows of whichever kind a file has as what a loss learns from: pairs, ranked lists or rows with a label."""

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any, Literal

from .encode import EncodedRows, encode_rows
from .files import OnError, PathLike, read_with
from .listed import ListedRow, encode_listed, normalize_listed
from .rows import DEFAULT_FIELDS, Fields, Row, RowError, normalize
from .tokenizers import Tokenizer
from .turns import row_error

Unit = Literal["pairs", "lists", "rows"]
Ranking = Literal["all", "best"]
AnyRow = Row | ListedRow


def normalize_any(record: Any, fields: Fields = DEFAULT_FIELDS, where: str = "") -> AnyRow:
    """A pair, or what `normalize_listed` takes: a record with completions and neither side of a pair."""
    # one Parquet file of several kinds has nulls in the columns of the others
    there = (
        {key for key, value in record.items() if value is not None} if isinstance(record, Mapping) else set()
    )
    listed = {"completions", "completion"} & there and not {fields.chosen, fields.rejected} & there
    return normalize_listed(record, fields, where) if listed else normalize(record, fields, where)


def check_several(row: ListedRow, wanted: str) -> None:
    """RowError for a single completion with a label."""
    if row.label is not None:
        remedy = "write pairs or ranked lists, or take a loss of single rows (KTO)"
        raise row_error(row.where, None, wanted, "one with a label", remedy)


def as_pairs(row: AnyRow, ranking: Ranking) -> list[Row]:
    """Of a ranked list all pairs, or the best with each of the others."""
    if isinstance(row, Row):
        return [row]
    check_several(row, "two completions to compare")
    best, *rest = row.completions
    pairs = combinations(row.completions, 2) if ranking == "all" else ((best, other) for other in rest)
    return [Row(row.prompt, *pair, row.split, row.where, row.weight) for pair in pairs]


def as_lists(row: AnyRow) -> list[ListedRow]:
    """Of a pair a list of two."""
    if isinstance(row, Row):
        return [ListedRow(row.prompt, (row.chosen, row.rejected), None, row.where, row.split, row.weight)]
    check_several(row, "completions to rank")
    return [row]


def as_rows(row: AnyRow) -> list[ListedRow]:
    """Of a pair two rows, of which chosen is wanted and rejected is not."""
    if isinstance(row, Row):
        sides = ((row.chosen, True), (row.rejected, False))
        return [ListedRow(row.prompt, (text,), yes, row.where, row.split, row.weight) for text, yes in sides]
    if row.label is None:
        remedy = "say of each whether it is wanted, or take a loss of lists or of pairs"
        raise row_error(row.where, "completions", "one completion with a label", "a ranked list", remedy)
    return [row]


def read_as(
    unit: Unit,
    path: PathLike,
    fields: Fields = DEFAULT_FIELDS,
    *,
    on_error: OnError = "raise",
    ranking: Ranking | None = None,
) -> tuple[list[Any], list[RowError]]:
    """The rows of a file as what is to be learned from, `Row`s or `ListedRow`s; and errors as in `read_rows`.

    ranking: the pairs that are made of a ranked list, 'all' (without it) or 'best'.

    ValueError for a ranking where no pair is made of a list.
    """
    kinds: dict[str, Callable[[AnyRow], list[Any]]] = {
        "pairs": lambda row: as_pairs(row, ranking or "all"),
        "lists": as_lists,
        "rows": as_rows,
    }
    lists = 0

    def made(record: Any, where: str) -> list[Any]:
        nonlocal lists
        row = normalize_any(record, fields, where)
        lists += isinstance(row, ListedRow)
        if unit != "pairs" and isinstance(row, Row) and row.margin is not None:
            remedy = "leave it out, or take a loss of pairs"
            raise row_error(where, fields.margin, "none, for it is about pairs", str(row.margin), remedy)
        return kinds[unit](row)

    rows, errors = read_with(made, path, fields, on_error)
    if ranking is not None and (unit != "pairs" or not lists):
        got = "none" if unit == "pairs" else f"a loss of {unit}"
        raise ValueError(f"expected ranked lists to make pairs of, got {got}; leave the ranking out")
    return [row for each in rows for row in each], errors


def encode_as(
    unit: Unit,
    rows: list[Any],
    tokenizer: Tokenizer,
    max_length: int,
    *,
    on_error: OnError = "raise",
    seed: int = 0,
) -> EncodedRows[Any]:
    """Their ids, by `encode_rows` or `encode_listed`."""
    if unit == "pairs":
        return encode_rows(rows, tokenizer, max_length, on_error=on_error)
    return encode_listed(rows, tokenizer, max_length, on_error=on_error, seed=seed)
