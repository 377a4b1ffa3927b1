"""Preference files to rows, and rows to a training and a held-out part."""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from .formats import read_records
from .rows import DEFAULT_FIELDS, Fields, Row, RowError, normalize
from .turns import Message, describe

PathLike = str | os.PathLike[str]
OnError = Literal["raise", "skip"]
R = TypeVar("R")


def read_rows(
    path: PathLike | Sequence[PathLike], fields: Fields = DEFAULT_FIELDS, *, on_error: OnError = "raise"
) -> tuple[list[Row], list[RowError]]:
    """The rows of one file or of several, in order, and the errors of the rows that were skipped.

    Files end in `.jsonl`, `.json` (a list of objects, an object with one list under 'data' or 'rows', or
    JSON lines after all), either with `.gz`, or `.parquet`. Text is UTF-8, with or without a byte order
    mark.

    on_error: 'raise' stops at the first row that cannot be used; 'skip' leaves such rows out and returns
    their errors. What is wrong with a file as a whole (missing, truncated, unknown, empty) is always a
    ValueError.
    """
    return read_with(lambda record, where: normalize(record, fields, where), path, fields, on_error)


def read_with(
    made: Callable[[Any, str], R], path: PathLike | Sequence[PathLike], fields: Fields, on_error: OnError
) -> tuple[list[R], list[RowError]]:
    """What `made` makes of the records of files and of their places, and the errors that were skipped."""
    check_on_error(on_error)
    paths = _paths(path)
    rows: list[R] = []
    errors: list[RowError] = []
    for item in paths:
        # The bare name reads best, unless another file of the same name is read as well.
        name = item.name if sum(item.name == other.name for other in paths) == 1 else str(item)
        count = 0
        for placed in read_records(item, name, fields):
            count += 1
            try:
                if isinstance(placed, RowError):
                    raise placed
                where, record = placed
                rows.append(made(record, where))
            except RowError as error:
                if on_error == "raise":
                    raise
                errors.append(error)
        if not count:
            raise ValueError(f"{name}: expected rows, got an empty file; add rows or name another file")
    return rows, errors


def check_on_error(on_error: str) -> None:
    """ValueError for anything but 'raise' and 'skip'."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f"expected on_error 'raise' or 'skip', got {on_error!r}; choose one of the two")


def _paths(path: PathLike | Sequence[PathLike]) -> list[Path]:
    if isinstance(path, (str, os.PathLike)):
        return [Path(path)]
    if not isinstance(path, (list, tuple)) or not all(isinstance(item, (str, os.PathLike)) for item in path):
        raise TypeError(f"expected the path of a file or a list of paths, got {describe(path)}; name a file")
    if not path:
        raise ValueError("expected at least one file, got an empty list of paths; name a file")
    return [Path(item) for item in path]


class Splittable(Protocol):
    """A `Row` or a `ListedRow`."""

    @property
    def prompt(self) -> str | tuple[Message, ...]: ...
    @property
    def split(self) -> str | None: ...


S = TypeVar("S", bound=Splittable)


def split_rows(rows: Sequence[S], fraction: float, seed: int = 0) -> tuple[list[S], list[S]]:
    """The training rows and the held-out rows, each in the order of `rows`.

    Where any row says its split, the rows decide, whatever the fraction: 'test' is held out, everything else
    trains. Otherwise about `fraction` of the rows is held out, all rows of one prompt together, so that no
    prompt stands in both parts. Which ones depends on the prompts and the seed alone, not on the order of
    the rows or on the process. Fraction 0 holds nothing out; any other holds out at least one row and leaves
    at least one.

    ValueError for no rows, a fraction outside [0, 1), no training row, and, unless the fraction is 0, no
    held-out row or fewer than two prompts to divide.
    """
    if not isinstance(fraction, (int, float)) or not 0 <= fraction < 1:
        raise ValueError(f"expected a fraction from 0 to below 1, got {fraction!r}; 0.1 holds out a tenth")
    if not rows:
        raise ValueError("expected rows to split, got none; read some first")
    if any(row.split for row in rows):
        train = [row for row in rows if row.split != "test"]
        if not train:
            remedy = "mark some as 'train' or remove the split field"
            raise ValueError(f"expected rows to train on, got only rows marked as held out; {remedy}")
        held_out = [row for row in rows if row.split == "test"]
        if fraction and not held_out:
            remedy = "mark some as 'test', remove the split field, or hold out a fraction of 0"
            raise ValueError(f"expected rows to hold out, got only rows marked for training; {remedy}")
        return train, held_out
    if fraction == 0:
        return list(rows), []
    keys = [_prompt_key(row.prompt) for row in rows]
    held = _held_out(keys, fraction, seed)
    parts: tuple[list[S], list[S]] = ([], [])
    for row, key in zip(rows, keys, strict=True):
        parts[key in held].append(row)
    return parts


def _prompt_key(prompt: str | tuple[Message, ...]) -> str:
    """One text per prompt; plain text is the same prompt as a dialogue of that one question."""
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return json.dumps([(turn.role, turn.content) for turn in turns])


def _held_out(keys: list[str], fraction: float, seed: int) -> set[str]:
    sizes: defaultdict[str, int] = defaultdict(int)
    for key in keys:
        sizes[key] += 1
    if len(sizes) < 2:
        remedy = "add rows or hold out a fraction of 0"
        raise ValueError(f"expected at least two different prompts to hold some out, got one; {remedy}")
    order = sorted(sizes, key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest())
    target = fraction * len(keys)
    held: set[str] = set()
    count = 0
    for key in order[:-1]:  # the last one always trains
        # Taken where that comes closer to the target; a prompt with very many rows is passed over.
        if abs(count + sizes[key] - target) < abs(count - target):
            held.add(key)
            count += sizes[key]
    return held or {min(order, key=lambda key: sizes[key])}
