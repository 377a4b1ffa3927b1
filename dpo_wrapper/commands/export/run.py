"""`dpo-wrapper export`: write, read back, compare, and say what came of it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo_wrapper.commands.export.agreement import ExportError
from dpo_wrapper.commands.export.config import ExportConfig, Format
from dpo_wrapper.commands.export.exported import Exported
from dpo_wrapper.commands.export.merged import write_merged
from dpo_wrapper.commands.export.mlx import write_mlx
from dpo_wrapper.commands.export.peft_folder import write_peft
from dpo_wrapper.commands.export.source import ExportSource
from dpo_wrapper.commands.export.x_transformers import write_x_transformers
from dpo_wrapper.data.whole_files import write_whole
from dpo_wrapper.data.writable import check_writable
from dpo_wrapper.display.terminal import hide_library_bars, print_line
from dpo_wrapper.version import __version__

EXPORT_FILE = "export.json"

WRITERS: dict[Format, Callable[[ExportSource, Path, ExportConfig], Exported]] = {
    "peft": write_peft,
    "mlx": write_mlx,
    "x-transformers": write_x_transformers,
    "merged": write_merged,
}
"""In the order in which they are written: those that merge the adapter come last."""


def run_export(config: ExportConfig) -> int:
    """Write each export, read it back, and print how far it is apart; returns how many differ.

    Raises:
        ValueError, TypeError, OSError, ImportError: one sentence about what cannot be exported.
    """
    hide_library_bars()
    check_writable(config.out)
    formats = [name for name in WRITERS if name in config.to]
    for name in formats:
        check_new(config.out / name)
    source = ExportSource.load(config)
    num_failed = 0
    for name in formats:
        num_failed += not export(source, config, name)
    return num_failed


def check_new(folder: Path) -> None:
    """Raise ValueError if a folder holds something that is no export of this command."""
    if folder.exists() and not (folder / EXPORT_FILE).is_file() and any(folder.iterdir()):
        raise ValueError(
            f"--out should be a folder without {folder.name}, or with that of an earlier export, but "
            f"{folder} holds something else: name another."
        )


def export(source: ExportSource, config: ExportConfig, name: Format) -> bool:
    """Write one export and read it back; whether the two agree is noted in its export.json."""
    folder = config.out / name
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    record: dict[str, Any] = {"version": __version__, "model": config.model, "format": name}
    record |= {"settings": json.loads(json.dumps(asdict(config), default=str)), "status": "written"}
    write_record(folder, record)
    exported = WRITERS[name](source, folder, config)
    write_record(folder, record)
    try:
        agreements, missing = exported.read_back(source.outputs)
    except ExportError as error:
        write_record(folder, record | {"status": "differs", "error": str(error)})
        print_line(f"{name}: {error}")
        return False
    record |= {"status": "verified", "agreements": [asdict(one) for one in agreements]}
    write_record(folder, record)
    print_line(f"{name}: {folder}")
    for line in [*(one.words for one in agreements), *missing, *exported.notes]:
        print_line(f"  {line}")
    for line in exported.usage:
        print_line(f"    {line}")
    return True


def write_record(folder: Path, record: dict[str, Any]) -> None:
    write_whole(folder / EXPORT_FILE, json.dumps(record, indent=2) + "\n")
