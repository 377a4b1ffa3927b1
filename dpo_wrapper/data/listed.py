"""Rows of other data than pairs: ranked lists of completions, and single completions with a label."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_wrapper.batches.unpaired import partners

from .encode import Encoded, EncodedRows, TokenList, check_max_length, collect, encode_completions
from .files import OnError
from .rows import DEFAULT_FIELDS, Fields, Turns, normalize
from .tokenizers import Tokenizer
from .turns import describe, names, row_error


@dataclass(frozen=True)
class ListedRow:
    """A prompt with its completions, the best first, or with one completion and its label.

    label: True where the completion is wanted, None for a ranked list.
    split, weight: as in `Row`.
    """

    prompt: str | Turns
    completions: tuple[str, ...]
    label: bool | None = None
    where: str = ""
    split: str | None = None
    weight: float | None = None


def normalize_listed(record: Any, fields: Fields = DEFAULT_FIELDS, where: str = "") -> ListedRow:
    """`{"prompt", "completions"}`, the best first, or `{"prompt", "completion", "label"}`.

    Prompts and completions have the forms of the rows of pairs: text, whole dialogues, or messages. RowError
    for anything else, one sentence that starts with the place and the field.
    """
    if not isinstance(record, Mapping):
        wanted, remedy = "an object with a prompt and completions", "write one object per row"
        raise row_error(where, None, wanted, describe(record), remedy)
    if record.get(fields.margin) is not None:
        remedy = "leave it out, or write pairs"
        raise row_error(
            where, fields.margin, "none, for it is about pairs", describe(record[fields.margin]), remedy
        )
    if record.get("completions") is not None:
        texts = record["completions"]
        if not isinstance(texts, Sequence) or isinstance(texts, str) or len(texts) < 2:
            wanted, remedy = "a list of two completions or more, the best first", "give at least two"
            raise row_error(where, "completions", wanted, describe(texts), remedy)
        return _row(record, texts, None, fields, where)
    if "completion" not in record:
        remedy = "add it, or 'completions' with a ranked list"
        raise row_error(where, "completion", "this field", f"a record with {names(record)}", remedy)
    label = record.get("label")
    if not isinstance(label, bool):
        remedy = "say whether the completion is wanted"
        raise row_error(where, "label", "true or false", describe(label), remedy)
    return _row(record, [record["completion"]], label, fields, where)


def _row(
    record: Mapping[Any, Any], texts: Sequence[Any], label: bool | None, fields: Fields, where: str
) -> ListedRow:
    rest = {key: value for key, value in record.items() if key not in ("completions", "completion", "label")}
    # a pair of one completion with itself has all the forms that a row of pairs may have
    fields = replace(fields, chosen="completion", rejected="completion again")
    rows = [normalize({**rest, "completion": t, "completion again": t}, fields, where) for t in texts]
    first = rows[0]
    for number, row in enumerate(rows[1:], start=2):
        if row.prompt != first.prompt:
            wanted, remedy = "completions of one prompt", "let every completion answer the same prompt"
            raise row_error(where, "completions", wanted, f"another one before number {number}", remedy)
    answers = tuple(row.chosen for row in rows)
    return ListedRow(first.prompt, answers, label, where, first.split, first.weight)


def encode_listed(
    rows: Iterable[ListedRow],
    tokenizer: Tokenizer,
    max_length: int,
    *,
    on_error: OnError = "raise",
    seed: int = 0,
) -> EncodedRows[TokenList]:
    """The ids of rows, shortened as those of pairs are: the prompt is kept alike for all completions.

    Each row with a label also gets a completion of another prompt, drawn by the seed from these rows.
    """

    def encode(row: ListedRow) -> Encoded:
        found = encode_completions(row.prompt, row.completions, tokenizer, max_length)
        prompt, completions = found.entry
        return found._replace(entry=TokenList(prompt, completions, row.label, row.where, row.weight))

    check_max_length(max_length)
    encoded = collect(rows, encode, on_error)
    return replace(encoded, entries=with_mismatches(encoded.entries, max_length, seed))


def with_mismatches(entries: list[TokenList], max_length: int, seed: int) -> list[TokenList]:
    labelled = [k for k, entry in enumerate(entries) if entry.label is not None]
    entries = list(entries)
    for k, other in zip(labelled, partners([entries[k].prompt for k in labelled], seed), strict=True):
        if other is not None:
            ids = entries[labelled[other]].completions[0][: max_length - len(entries[k].prompt)]
            entries[k] = replace(entries[k], mismatched=ids)
    return entries
