"""A file of finished work that a process appends to, and the next one reads where the first was killed."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from dpo_wrapper.data.whole_files import try_lock


class ProgressFile:
    """Records of finished work behind the settings that they were made with, one JSON object a line.

    It is locked while it is open. What is appended is on the disk when `append` returns; a line that a killed
    process has not finished is dropped.

    Args:
        path: of the file, which is created if it is not there.
        settings: what the work depends on, by the names of options.

    Attributes:
        records: those that are in the file.

    Raises:
        ValueError: the file has records that were made with other settings, or another process has it open.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.stream = path.open("ab+")
        try:
            if not try_lock(self.stream):
                raise ValueError(
                    f"{path} should be written by one process, but another is writing to it now: wait for "
                    "its end, or name another --out."
                )
            self.stream.seek(0)
            content = self.stream.read()
            whole = content[: content.rfind(b"\n") + 1]
            self.stream.truncate(len(whole))
            lines = [json.loads(line) for line in whole.splitlines()]
            self.records: list[dict[str, Any]] = lines[1:]
            if self.records:
                check_settings(lines[0]["settings"], settings, path)
            else:  # nothing is done yet
                self.stream.truncate(0)
                self._write({"settings": dict(settings)})
        except BaseException:
            self.stream.close()
            raise

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record to the disk."""
        self._write(record)
        self.records.append(dict(record))

    def remove(self) -> None:
        """Delete the file, whose records are kept elsewhere."""
        self.path.unlink()

    def _write(self, record: Mapping[str, Any]) -> None:
        self.stream.write(json.dumps(record).encode() + b"\n")
        self.stream.flush()
        os.fsync(self.stream.fileno())

    def __enter__(self) -> "ProgressFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stream.close()


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that a file's records were made with; empty if there are no records."""
    with suppress(OSError), path.open("rb") as stream:
        first, second = stream.readline(), stream.readline()
        if second.endswith(b"\n"):
            return dict(json.loads(first)["settings"])
    return {}


def check_settings(found: Mapping[str, Any], given: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError if work was begun with other settings."""
    for name in {**found, **given}:
        one, other = found.get(name), given.get(name)
        if one != other:
            raise ValueError(
                f"what {path} has begun should be continued with the same settings, but {name} "
                f"{describe_change(one, other)}: repeat the first command, or delete {path} to begin again."
            )


def describe_change(found: Any, given: Any) -> str:
    """How a setting differs, as a part of a sentence."""
    if any(isinstance(value, (list, dict)) for value in (found, given)):
        return "are not what they were"
    return f"was {found} and is {given}"
