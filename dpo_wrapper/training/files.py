"""Files that are written whole, and folders of them."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpo_wrapper.data.whole_files import flush_to_disk, write_whole


def write_json(file: Path, content: Any, indent: int | None = None) -> None:
    """Write a file completely or not at all."""
    write_whole(file, json.dumps(content, indent=indent) + "\n")


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a file; none if there is no such file."""
    if not file.exists():
        return []
    with file.open(encoding="utf-8") as lines:  # str.splitlines() splits at U+2028 too, which JSON may hold
        return [json.loads(line) for line in lines]


def write_json_lines(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a file completely or not at all."""
    write_whole(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def link_file(file: Path, name: Path) -> None:
    """Give a file a second name; a copy has it where the file system knows no links."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)


def remove_folder(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def flush_folder(folder: Path) -> None:
    """Wait until the disk holds the files of a folder and of those in it."""
    for path in folder.iterdir():
        if path.is_dir():
            flush_folder(path)
        else:
            flush_to_disk(path)
    flush_names(folder)


def flush_names(folder: Path) -> None:
    """Wait until the disk holds the names of the files in a folder, where a folder can be opened."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
