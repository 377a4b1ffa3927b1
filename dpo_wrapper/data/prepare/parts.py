"""The rows of files in parts, which processes prepare independently of one another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dpo_wrapper.data.errors import ExampleError
from dpo_wrapper.data.examples import Fields
from dpo_wrapper.data.files import Source
from dpo_wrapper.data.json_records import RawLine, Record
from dpo_wrapper.data.readers import read_raw_records

MAX_PART_ROWS = 4096
MAX_PART_BYTES = 8 * 2**20
"""Limits of a part, which bound the memory of a process."""


class RawRow(NamedTuple):
    """A row before it is parsed, with the number of its source and the split that the source says."""

    source_number: int
    content: RawLine | Record
    split: str | None

    @property
    def place(self) -> str:
        content = self.content
        if isinstance(content, RawLine):
            return f"{content.name}, line {content.number}"
        return content.source if isinstance(content, ExampleError) else content[0]

    @property
    def size(self) -> int:
        """Its bytes, where they are known without parsing it."""
        return len(self.content.line) if isinstance(self.content, RawLine) else 0


@dataclass(frozen=True)
class Part:
    """Consecutive rows. How rows make parts depends on the files alone."""

    number: int
    rows: Sequence[RawRow]


def read_parts(sources: Sequence[Source], fields: Fields, split: str | None = None) -> Iterator[Part]:
    """The rows of all sources in parts.

    Raises:
        ValueError: a file is unreadable or has no rows.
    """
    rows: list[RawRow] = []
    number = size = 0
    for source_number, source in enumerate(sources):
        for content, own_split in read_raw_records(source, fields, split):
            row = RawRow(source_number, content, own_split)
            if rows and (len(rows) == MAX_PART_ROWS or size + row.size > MAX_PART_BYTES):
                yield Part(number, rows)
                rows, size, number = [], 0, number + 1
            rows.append(row)
            size += row.size
    if rows:
        yield Part(number, rows)


def name_place(error: ExampleError) -> dict[str, Any]:
    """File, line, field and message of an error, for a file of refused rows."""
    head, _, last = error.source.partition(", column ")[0].rpartition(", ")
    kind, _, number = last.partition(" ")
    is_place = bool(head) and kind in ("line", "row") and number.isdigit()
    place: dict[str, Any] = {"file": head, kind: int(number)} if is_place else {"file": error.source}
    place |= {"field": error.field} if error.field else {}
    place |= {"message": error.message} if error.message else {}
    return place | {"reason": str(error.args[0])}
