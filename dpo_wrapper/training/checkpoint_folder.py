"""The checkpoints of a run: how far each one is, which are whole, and how a new one takes its place."""

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from dpo_wrapper.training.config import STAGES, StageName
from dpo_wrapper.training.files import flush_folder, flush_names, remove_folder, write_json

PROGRESS_FILE = "progress.json"
CHECKPOINT_NAME = re.compile(rf"({'|'.join(STAGES)})-(\d+)(-evaluated)?")


@dataclass(frozen=True)
class Progress:
    """Position of a run: `step` steps of `stage` are done, and the log had `log_bytes` bytes by then.

    `is_evaluated` says whether the evaluation after this step, if one is due, is logged as well, `is_trained`
    whether the step is the last of its stage.
    """

    stage: StageName = "pretrain"
    step: int = 0
    log_bytes: int = 0
    is_evaluated: bool = False
    is_trained: bool = False

    @property
    def checkpoint_name(self) -> str:
        return f"{self.stage}-{self.step}{'-evaluated' * self.is_evaluated}"


class CheckpointFolder:
    """The folder of a run's last checkpoints, each in a folder such as dpo-120 or dpo-120-evaluated.

    A new one is written as NAME.new, flushed to the disk and renamed, and one that is removed is renamed to
    NAME.old first: NAME is whole, however a run ends. Its last file, progress.json, lists the others with
    their sizes, so that damage by other hands is found as well.

    Args:
        path: the folder; it is created with the first checkpoint.
        limit: how many checkpoints are kept.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit

    def folder(self, progress: Progress) -> Path:
        """Where the checkpoint of this progress is, if there is one."""
        return self.path / progress.checkpoint_name

    def new_folder(self, progress: Progress) -> Path:
        """Where the files of a checkpoint are written until it is complete."""
        return self.path / f"{progress.checkpoint_name}.new"

    def create_new(self, progress: Progress) -> None:
        """Create an empty folder for the files of the next checkpoint."""
        self.path.mkdir(exist_ok=True)
        remove_folder(self.new_folder(progress))
        self.new_folder(progress).mkdir()

    def complete(self, progress: Progress) -> None:
        """Give a checkpoint its name once all of its files are written."""
        new, folder = self.new_folder(progress), self.folder(progress)
        if self.is_whole(folder.name):  # the run resumed from it and ended without another step
            write_progress(folder, progress)
            remove_folder(new)
        else:
            write_progress(new, progress)
            flush_folder(new)
            remove_folder(folder)
            os.rename(new, folder)
        flush_names(self.path)

    def list_names(self) -> list[str]:
        """The names of the checkpoints, damaged ones among them, the newest first."""
        if not self.path.is_dir():
            return []
        names = (folder.name for folder in self.path.iterdir() if folder.is_dir())
        return sorted(filter(CHECKPOINT_NAME.fullmatch, names), key=sort_key, reverse=True)

    def read_progress(self, name: str) -> Progress:
        """The progress of a whole checkpoint.

        Raises:
            ValueError: says what the checkpoint lacks.
        """
        folder = self.path / name
        if not folder.is_dir():
            raise ValueError(f"{name} is not there")
        try:
            content = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
            files = dict(content.pop("files"))
            progress = Progress(**content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{name} has no {PROGRESS_FILE} that can be read") from error
        for file, num_bytes in files.items():
            if not (folder / file).is_file():
                raise ValueError(f"{name} lacks {file}")
            if (size := (folder / file).stat().st_size) != num_bytes:
                raise ValueError(f"{file} of {name} has {size:,} bytes in place of {num_bytes:,}")
        return progress

    def is_whole(self, name: str) -> bool:
        try:
            self.read_progress(name)
        except ValueError:
            return False
        return True

    def find_newest(self, last: str | None) -> tuple[Progress | None, list[str]]:
        """The progress of the newest whole checkpoint, if there is one, and what is wrong with newer ones.

        Args:
            last: the name of the last checkpoint that is known to have been completed.
        """
        problems: list[str] = []
        known = {last} if last else set()
        for name in sorted(known.union(self.list_names()), key=sort_key, reverse=True):
            try:
                return self.read_progress(name), problems
            except ValueError as error:
                problems.append(str(error))
        return None, problems

    def remove_old(self) -> None:
        """Remove all checkpoints but the last whole ones."""
        kept = [name for name in self.list_names() if self.is_whole(name)][: self.limit]
        for name in self.list_names():
            if name not in kept:
                os.rename(self.path / name, self.path / f"{name}.old")
                remove_folder(self.path / f"{name}.old")

    def remove_unfinished(self) -> None:
        """Remove what a run that was killed was writing or removing."""
        if self.path.is_dir():
            for folder in list(self.path.iterdir()):
                if folder.is_dir() and folder.suffix in (".new", ".old"):
                    remove_folder(folder)


def sort_key(name: str) -> tuple[int, int, bool]:
    """The order in which a run completes its checkpoints."""
    match = CHECKPOINT_NAME.fullmatch(name)
    assert match is not None
    return STAGES.index(match[1]), int(match[2]), match[3] is not None


def write_progress(folder: Path, progress: Progress) -> None:
    """Write progress.json of a checkpoint, whose other files are there."""
    sizes = {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(PROGRESS_FILE)
    }
    write_json(folder / PROGRESS_FILE, asdict(progress) | {"files": sizes})
