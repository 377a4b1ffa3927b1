"""The run folder: settings, logged metrics, and the checkpoint that an interrupted run resumes from.

docs/training.md lists its files.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_wrapper.training.config import TrainConfig, flag

CHANGEABLE_SETTINGS = ("resume", "out", "save_steps", "cpu")
"""Settings that may change when a run is resumed."""


@dataclass(frozen=True)
class Progress:
    """Position of a run: `step` steps of `stage` are done, and the log had `log_bytes` bytes by then."""

    stage: str = "sft"
    step: int = 0
    log_bytes: int = 0


class RunFolder:
    """Paths and files of one run. `progress` is its beginning, or its latest checkpoint."""

    def __init__(self, config: TrainConfig) -> None:
        self.path = Path(config.out)
        self.config_file = self.path / "config.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.sft_folder = self.path / "sft"
        self.checkpoint_folder = self.path / "checkpoint"
        self.new_checkpoint_folder = self.path / "checkpoint.new"
        self.settings = json.loads(json.dumps(asdict(config), default=str))
        self.progress = Progress()

    def check(self, resume: bool) -> None:
        """Check that a run can start, or resume, in this folder; a resumed run reads its progress.

        Raises:
            ValueError: the folder is in use, or it holds no unfinished run with these settings.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--out should be a folder, but {self.path} is a file: name a new folder.")
        if resume:
            self._check_resumable()
            progress_file = self.checkpoint_folder / "progress.json"
            if progress_file.is_file():
                self.progress = Progress(**json.loads(progress_file.read_text(encoding="utf-8")))
        elif self.path.exists() and any(self.path.iterdir()):
            raise ValueError(
                f"--out should be a new or empty folder, but {self.path} is not empty: name a new folder, or "
                "add --resume to continue the run in it."
            )

    def _check_resumable(self) -> None:
        if not self.config_file.is_file():
            raise ValueError(f"--resume needs an unfinished run, but {self.path} holds no run: leave it out.")
        before = json.loads(self.config_file.read_text(encoding="utf-8")).get("dpo_wrapper", {})
        changed = ", ".join(
            f"{flag(name)} {before.get(name)}"
            for name, value in self.settings.items()
            if name not in CHANGEABLE_SETTINGS and value != before.get(name)
        )
        if changed:
            raise ValueError(f"--resume needs the settings that the run began with, but it had {changed}.")
        if (self.path / "model.safetensors").exists():
            raise ValueError(
                f"--resume needs an unfinished run, but that in {self.path} is finished: name a new folder."
            )

    def open(self) -> None:
        """Create the folder and write the settings, or truncate the log to where the checkpoint stands."""
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"dpo_wrapper": self.settings}, indent=2) + "\n"
        self.config_file.write_text(text, encoding="utf-8")
        self.metrics_file.touch()
        with self.metrics_file.open("r+b") as log:
            log.truncate(self.progress.log_bytes)

    def log_metrics(self, stage: str, part: str, step: int, values: dict[str, float]) -> None:
        """Append one line to the log; `part` is "step" for a training step, or the split evaluated on."""
        with self.metrics_file.open("a", encoding="utf-8") as log:
            log.write(json.dumps({"stage": stage, "part": part, "step": step, **values}) + "\n")

    def read_records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.metrics_file.read_text(encoding="utf-8").splitlines()]

    def create_new_checkpoint(self) -> None:
        """Create an empty folder for the files of the next checkpoint."""
        shutil.rmtree(self.new_checkpoint_folder, ignore_errors=True)
        self.new_checkpoint_folder.mkdir()

    def replace_checkpoint(self, stage: str, step: int) -> None:
        """Put the new, complete checkpoint in the place of the previous one, which is kept until then."""
        self.progress = Progress(stage, step, self.metrics_file.stat().st_size)
        progress_file = self.new_checkpoint_folder / "progress.json"
        progress_file.write_text(json.dumps(asdict(self.progress)), encoding="utf-8")
        old = self.path / "checkpoint.old"
        shutil.rmtree(old, ignore_errors=True)
        if self.checkpoint_folder.exists():
            self.checkpoint_folder.rename(old)
        self.new_checkpoint_folder.rename(self.checkpoint_folder)
        shutil.rmtree(old, ignore_errors=True)
