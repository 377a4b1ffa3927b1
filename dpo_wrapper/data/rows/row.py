"""A row of a file, which knows which of its columns were used."""

from collections.abc import Iterator, Mapping
from typing import Any

from dpo_wrapper.data.errors import ExampleError, describe_value
from dpo_wrapper.data.rows.messages import json_or_text


class Row(Mapping[str, Any]):
    """The columns of a row that are not null: Parquet fills the columns of other forms with nulls.

    A name with dots reaches into nested objects, as in `input.messages`, unless a column has that very name.

    Args:
        record: the row's object.
        renamed: the names that columns have instead of the usual ones; empty for columns that are ignored.
        source: the row's place, for messages.

    Attributes:
        used: the names of the columns that were looked up.
    """

    def __init__(self, record: Any, renamed: Mapping[str, str] | None = None, source: str = "") -> None:
        if not isinstance(record, Mapping):
            problem = (
                f"a row should be an object with prompt and completions, but it is {describe_value(record)}"
            )
            raise ExampleError(f"{problem}: write one object per row.", source=source)
        self.record = record
        self.renamed = renamed or {}
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        value = self._find(name)
        column = self.column(name)
        if value is not None or column in self.record:
            self.used.add(column if column in self.record else column.split(".")[0])
        if value is None:
            raise KeyError(column)
        return value

    def __contains__(self, name: object) -> bool:
        """Whether the column is there and not null; it does not count as used."""
        return isinstance(name, str) and self._find(name) is not None

    def peek(self, name: str) -> Any:
        """The value of a column, or None; it does not count as used."""
        return self._find(name)

    def _find(self, name: str) -> Any:
        """The value of a column, or None."""
        column = self.column(name)
        value: Any = self.record
        for key in [column] if column in self.record else column.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def column(self, name: str) -> str:
        """The name that a column has in this file."""
        return self.renamed.get(name, name)

    def has_column(self, column: str) -> bool:
        """Whether the row has a column of this name, or that in which its first dotted part lies."""
        return column in self.record or column.split(".")[0] in self.record

    def has_used(self, name: str) -> bool:
        """Whether the column was looked up."""
        return self.column(name) in self.used

    def __iter__(self) -> Iterator[str]:
        return iter(self.record)

    def __len__(self) -> int:
        return len(self.record)

    def first_of(self, *names: str) -> str | None:
        """The first of the names that the row has a value for."""
        return next((name for name in names if name in self), None)

    def unused(self) -> list[str]:
        """The columns with a value that nothing looked up."""
        return [
            str(name) for name, value in self.record.items() if value is not None and name not in self.used
        ]

    def get_json(self, name: str) -> Any:
        """A value that may be written as JSON text."""
        return json_or_text(self.get(name))
