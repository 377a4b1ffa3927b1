"""export.json: what an export was made of, how it was compared, and what its files were then."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo_wrapper.commands.export.agreement import Agreement, ExportError
from dpo_wrapper.commands.export.config import ExportConfig, Format
from dpo_wrapper.data.whole_files import hash_file, write_whole
from dpo_wrapper.pretrained.model import EXPORT_FILE, read_export
from dpo_wrapper.version import __version__

Record = Mapping[str, Any]


def begin_record(folder: Path, config: ExportConfig, name: Format) -> Record:
    """Note that an export is being written, which nobody should use yet."""
    settings = json.loads(json.dumps(asdict(config), default=str))
    record = {"version": __version__, "model": config.model, "format": name, "settings": settings}
    return write_record(folder, record | {"status": "written"})


def note_verified(folder: Path, record: Record, agreements: Sequence[Agreement]) -> None:
    """Note that an export agrees with the model, and the hashes of its files."""
    results = {"agreements": [asdict(one) for one in agreements], "files": hash_files(folder)}
    write_record(folder, {**record, "status": "verified", **results})


def note_difference(folder: Path, record: Record, error: ExportError) -> None:
    """Note that an export does not agree with the model."""
    write_record(folder, {**record, "status": "differs", "error": str(error)})


def write_record(folder: Path, record: Record) -> Record:
    write_whole(folder / EXPORT_FILE, json.dumps(record, indent=2) + "\n")
    return record


def hash_files(folder: Path) -> dict[str, str]:
    """A hash of each file of an export, by its path in the folder, but for export.json itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = (file.relative_to(folder).as_posix() for file in files)
    return {name: hash_file(folder / name) for name in names if name != EXPORT_FILE}


def check_unchanged(folder: Path, config: ExportConfig, name: Format) -> int:
    """Check that a verified export is what it was then; returns the number of its files.

    Raises:
        ExportError: a file has changed, is missing, or has come.
        ValueError: there is no such export, or it is one of another model.
    """
    record = read_export(folder)
    if record.get("format") != name or record.get("status") != "verified":
        raise ValueError(
            f"--check should be given where an export was verified, but {folder} is none: leave --check out "
            "to write it."
        )
    if record["model"] != config.model:
        raise ValueError(
            f"{folder} should be an export of {config.model}, but it is one of {record['model']}: name that, "
            "or another --out."
        )
    before, now = record["files"], hash_files(folder)
    changed = [file for file in sorted({**before, **now}) if before.get(file) != now.get(file)]
    if changed:
        raise ExportError(
            f"{folder} should be as it was when it was verified, but {', '.join(changed)} "
            f"{'is' if len(changed) == 1 else 'are'} not: do not use it, or export it again."
        )
    return len(now)
