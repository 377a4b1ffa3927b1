"""The run folder: settings, logged metrics, the checkpoint that an interrupted run resumes from, the model.

docs/training.md lists its files. What must be whole is written beside its place and renamed, so that a run
that is killed at any moment leaves a folder that it can resume from.
"""

import json
import math
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

from dpo_wrapper.pretrained import RUN_FILE, read_run
from dpo_wrapper.training.config import STAGES, StageName, TrainConfig, flag
from dpo_wrapper.training.files import (
    check_writable,
    link_file,
    read_json_lines,
    remove_folder,
    write_json,
)

CHANGEABLE_SETTINGS = (
    "resume", "out", "save_steps", "cpu", "fsdp", "logging_steps", "sample_steps", "samples", "report_to",
    "project",
)  # fmt: skip
"""Settings that may change when a run is resumed."""

RunStatus = Literal["training", "trained", "finished"]
"""A run is trained once its model is saved, and finished once it is evaluated and reported as well."""


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


class RunFolder:
    """Paths and files of one run.

    Attributes:
        progress: the beginning of the run, or its latest checkpoint.
        status: whether the model is saved, and reported.
        run_id: what trackers know the run by.
        today: the day on which the run began, which chat templates may print.
        reference: what the reference is, in words; None until preference training begins.
        notes: what a person should know of a run that is resumed.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = Path(config.out)
        self.run_file = self.path / RUN_FILE
        self.metrics_file = self.path / "metrics.jsonl"
        self.samples_file = self.path / "samples.jsonl"
        self.checkpoint_folder = self.path / "checkpoint"
        self.explanations_file = self.path / "explanations.jsonl"
        self.best_file = self.path / "best.safetensors"
        self.new_checkpoint_folder = self.path / "checkpoint.new"
        self.old_checkpoint_folder = self.path / "checkpoint.old"
        self.settings = json.loads(json.dumps(asdict(config), default=str))
        self.progress = Progress()
        self.status: RunStatus = "training"
        self.run_id = uuid.uuid4().hex
        self.today = date.today()
        self.start_time = time.monotonic()
        self.reference: str | None = None
        self.notes: list[str] = []

    def check(self, resume: bool) -> None:
        """Check that a run can start, or resume, in this folder; a resumed run reads its progress.

        Raises:
            ValueError: the folder cannot be written or is in use, or it holds no unfinished run with these
                settings.
        """
        check_writable(self.path)
        if resume:
            self._read_run()
            checkpoints = self._whole_checkpoints()
            self.progress = checkpoints[0][0] if checkpoints else Progress()
        elif self.path.exists() and any(path.suffix != ".new" for path in self.path.iterdir()):
            raise ValueError(
                f"--out should be a new or empty folder, but {self.path} is not empty: name a new folder, or "
                "add --resume to continue the run in it."
            )

    def _read_run(self) -> None:
        if not self.run_file.is_file():
            raise ValueError(f"--resume needs an unfinished run, but {self.path} holds no run: leave it out.")
        run = read_run(self.path)
        if not run.keys() >= {"settings", "status"}:
            raise ValueError(
                f"{self.run_file} should hold the settings of a run, but it does not: name a new folder."
            )
        before, self.status = run["settings"], run["status"]
        self.today = date.fromisoformat(run.get("today", self.today.isoformat()))
        self.run_id = run.get("run_id", self.run_id)
        self.reference = run.get("reference")
        changed = ", ".join(
            f"{flag(name)} {before.get(name)}"
            for name, value in self.settings.items()
            if name not in CHANGEABLE_SETTINGS and value != before.get(name)
        )
        if changed:
            raise ValueError(f"--resume needs the settings that the run began with, but it had {changed}.")
        if self.status == "finished":
            raise ValueError(
                f"--resume needs an unfinished run, but that in {self.path} is finished: name a new folder."
            )

    def _whole_checkpoints(self) -> list[tuple[Progress, Path]]:
        """The checkpoints that are complete, the newest first. progress.json is the last file of each."""
        whole = []
        for folder in (self.checkpoint_folder, self.new_checkpoint_folder, self.old_checkpoint_folder):
            with suppress(OSError, ValueError, TypeError):
                content = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
                whole.append((Progress(**content), folder))
        return sorted(
            whole, key=lambda pair: (-STAGES.index(pair[0].stage), -pair[0].step, -pair[0].is_evaluated)
        )

    @property
    def needs_training(self) -> bool:
        """Whether steps are left, or the evaluation after the last one, of which there is a checkpoint."""
        return self.status == "training" or (self.status == "trained" and self.progress.is_trained)

    def open(self) -> None:
        """Create the folder and its settings, or put checkpoint and log back to where the run stands."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.run_file.exists():
            self.set_status("training")
        for _, folder in self._whole_checkpoints()[:1]:
            if folder != self.checkpoint_folder:
                remove_folder(self.checkpoint_folder)
                os.rename(folder, self.checkpoint_folder)
        for folder in (self.new_checkpoint_folder, self.old_checkpoint_folder):
            remove_folder(folder)
        if self.needs_training:
            self._cut_log()
            self.best_file.unlink(missing_ok=True)
            if (file := self.checkpoint_folder / self.best_file.name).exists():
                link_file(file, self.best_file)
        self.start_time = time.monotonic() - self._last_elapsed_seconds()

    def elapsed_seconds(self) -> float:
        """Time since the run began, without what a resumed run has to do again and without interruptions."""
        return time.monotonic() - self.start_time

    def _last_elapsed_seconds(self) -> float:
        """Of the last line of the log."""
        for line in reversed(self.metrics_file.read_text(encoding="utf-8").splitlines()[-1:]):
            with suppress(ValueError):  # a line that was cut
                return float(json.loads(line).get("elapsed_seconds", 0.0))
        return 0.0

    def _cut_log(self) -> None:
        """Take from the log what came after the checkpoint: it will be logged again."""
        self.metrics_file.touch()
        num_bytes, log_bytes = self.metrics_file.stat().st_size, self.progress.log_bytes
        if self.progress != Progress():
            self.notes.append(f"Continued after step {self.progress.step} of {self.progress.stage}.")
        elif num_bytes:
            number = next(k for k in range(1, 10**6) if not self._earlier_log(k).exists())
            os.rename(self.metrics_file, self._earlier_log(number))
            self.metrics_file.touch()
            self.notes.append(
                "There is no checkpoint, so the run begins again; what it had logged is now in "
                f"{self._earlier_log(number).name}."
            )
            return
        if num_bytes < log_bytes:
            self.notes.append(
                f"{self.metrics_file} lacks the last {log_bytes - num_bytes} bytes of the run before."
            )
        os.truncate(self.metrics_file, min(num_bytes, log_bytes))

    def _earlier_log(self, number: int) -> Path:
        return self.path / f"metrics.{number}.jsonl"

    def set_status(self, status: RunStatus) -> None:
        """Write the settings, and whether the model is saved and reported."""
        self.status = status
        content = {
            "status": status,
            "run_id": self.run_id,
            "today": self.today.isoformat(),
            "reference": self.reference,
        }
        write_json(self.run_file, content | {"settings": self.settings}, indent=2)

    def note_reference(self, sentence: str) -> None:
        """Write what the reference is, in words, beside the settings."""
        self.reference = sentence
        self.set_status(self.status)

    def log_metrics(self, stage: str, part: str, step: int, values: dict[str, float]) -> None:
        """Append one line to the log; `part` is "step" for a training step, or the split evaluated on.

        A value that is not finite is written as null: JSON knows no NaN.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self.metrics_file.open("a", encoding="utf-8") as log:
            log.write(json.dumps({"stage": stage, "part": part, "step": step, **finite}) + "\n")

    def read_records(self) -> list[dict[str, Any]]:
        return read_json_lines(self.metrics_file)

    def read_samples(self) -> list[dict[str, Any]]:
        return read_json_lines(self.samples_file)

    def create_new_checkpoint(self) -> None:
        """Create an empty folder for the files of the next checkpoint."""
        remove_folder(self.new_checkpoint_folder)
        self.new_checkpoint_folder.mkdir()

    def replace_checkpoint(
        self, stage: StageName, step: int, is_evaluated: bool = False, *, is_trained: bool = False
    ) -> None:
        """Put the new, complete checkpoint in the place of the previous one, which is kept until then."""
        self.progress = Progress(stage, step, self.metrics_file.stat().st_size, is_evaluated, is_trained)
        if self.best_file.exists():
            link_file(self.best_file, self.new_checkpoint_folder / self.best_file.name)
        write_json(self.new_checkpoint_folder / "progress.json", asdict(self.progress))
        remove_folder(self.old_checkpoint_folder)
        if self.checkpoint_folder.exists():
            os.rename(self.checkpoint_folder, self.old_checkpoint_folder)
        os.rename(self.new_checkpoint_folder, self.checkpoint_folder)
        remove_folder(self.old_checkpoint_folder)

    def find_model(self, stages: Sequence[StageName]) -> str | None:
        """The folder of the model with which a resumed run goes on; None if that is the run's own model."""
        number = stages.index(self.progress.stage) if self.progress.stage in stages else 0
        return str(self.stage_folder(stages[number - 1])) if number else None

    def stage_folder(self, stage: StageName) -> Path:
        """Where the model is as it was after a stage that is not the last."""
        return self.path / stage

    @contextmanager
    def new_stage_folder(self, stage: StageName) -> Iterator[Path]:
        """A folder for the files of the model after a stage, which becomes `stage_folder`."""
        with self._new_folder(f"{stage}.new") as folder:
            yield folder
        remove_folder(self.stage_folder(stage))
        os.rename(folder, self.stage_folder(stage))

    @contextmanager
    def new_model_folder(self) -> Iterator[Path]:
        """A folder for the files of the trained model, which become files of the run. It is trained then."""
        with self._new_folder("model.new") as folder:
            yield folder
        for file in sorted(folder.iterdir()):
            if (self.path / file.name).is_dir():
                remove_folder(self.path / file.name)
            os.replace(file, self.path / file.name)
        folder.rmdir()
        self.set_status("trained")

    @contextmanager
    def _new_folder(self, name: str) -> Iterator[Path]:
        remove_folder(self.path / name)
        (self.path / name).mkdir()
        yield self.path / name

    def finish(self) -> None:
        """Mark the run as finished, and delete what it would have resumed from."""
        self.set_status("finished")
        remove_folder(self.checkpoint_folder)
        self.best_file.unlink(missing_ok=True)
