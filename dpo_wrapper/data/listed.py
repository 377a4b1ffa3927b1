"""Rows of other data than pairs: ranked lists of completions, and single completions with a label."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .encode import encode_completions
from .files import OnError, PathLike, read_with
from .rows import Fields, Turns, normalize
from .tokenizers import Tokenizer
from .turns import RowError, describe, names, row_error


@dataclass(frozen=True)
class ListedRow:
    """A prompt with its completions, the best first, or with one completion and its label.

    label: True where the completion is wanted, None for a ranked list.
    """

    prompt: str | Turns
    completions: tuple[str, ...]
    label: bool | None = None
    where: str = ""


@dataclass(frozen=True)
class TokenList:
    """The ids of a `ListedRow`: every completion continues the same prompt."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    label: bool | None = None
    where: str = ""


def normalize_listed(record: Any, where: str = "") -> ListedRow:
    """`{"prompt", "completions"}`, the best first, or `{"prompt", "completion", "label"}`.

    Prompts and completions have the forms of the rows of pairs: text, whole dialogues, or messages. RowError
    for anything else, one sentence that starts with the place and the field.
    """
    if not isinstance(record, Mapping):
        wanted, remedy = "an object with a prompt and completions", "write one object per row"
        raise row_error(where, None, wanted, describe(record), remedy)
    if "completions" in record:
        texts = record["completions"]
        if not isinstance(texts, Sequence) or isinstance(texts, str) or len(texts) < 2:
            wanted, remedy = "a list of two completions or more, the best first", "give at least two"
            raise row_error(where, "completions", wanted, describe(texts), remedy)
        return _row(record, texts, None, where)
    if "completion" not in record:
        remedy = "add it, or 'completions' with a ranked list"
        raise row_error(where, "completion", "this field", f"a record with {names(record)}", remedy)
    label = record.get("label")
    if not isinstance(label, bool):
        remedy = "say whether the completion is wanted"
        raise row_error(where, "label", "true or false", describe(label), remedy)
    return _row(record, [record["completion"]], label, where)


def _row(record: Mapping[Any, Any], texts: Sequence[Any], label: bool | None, where: str) -> ListedRow:
    rest = {key: value for key, value in record.items() if key not in ("completions", "completion", "label")}
    # a pair of one completion with itself has all the forms that a row of pairs may have
    fields = Fields(chosen="completion")
    rows = [normalize({**rest, "completion": text, "rejected": text}, fields, where) for text in texts]
    first = rows[0]
    for number, row in enumerate(rows[1:], start=2):
        if row.prompt != first.prompt:
            wanted, remedy = "completions of one prompt", "let every completion answer the same prompt"
            raise row_error(where, "completions", wanted, f"another one before number {number}", remedy)
    return ListedRow(first.prompt, tuple(row.chosen for row in rows), label, where)


def read_listed(
    path: PathLike | Sequence[PathLike], *, on_error: OnError = "raise"
) -> tuple[list[ListedRow], list[RowError]]:
    """The rows of files like those of `read_rows`, and the errors of the rows that were skipped."""
    return read_with(normalize_listed, path, Fields(chosen="completion"), on_error)


def encode_listed(rows: Iterable[ListedRow], tokenizer: Tokenizer, max_length: int) -> list[TokenList]:
    """The ids of rows, shortened as those of pairs are: the prompt is kept alike for all completions."""
    encoded = []
    for row in rows:
        prompt, completions = encode_completions(row.prompt, row.completions, tokenizer, max_length)
        encoded.append(TokenList(tuple(prompt), tuple(map(tuple, completions)), row.label, row.where))
    return encoded
