"""The run folder: settings, logged metrics, checkpoints that an interrupted run continues from, the model.

docs/training.md lists its files. What must be whole is written beside its place and renamed, so that a run
that is killed at any moment leaves a folder that it can continue from.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from accelerate import Accelerator

from dpo_wrapper.data.whole_files import flush_to_disk
from dpo_wrapper.data.writable import check_writable
from dpo_wrapper.pretrained import RUN_FILE
from dpo_wrapper.training.checkpoint_folder import CheckpointFolder, Progress
from dpo_wrapper.training.config import StageName, TrainConfig, flag
from dpo_wrapper.training.files import (
    flush_folder,
    link_file,
    read_json_lines,
    remove_folder,
)
from dpo_wrapper.training.metrics_log import MetricsLog
from dpo_wrapper.training.run_lock import LOCK_FILE, lock_run
from dpo_wrapper.training.run_record import RunRecord, RunStatus
from dpo_wrapper.training.stopping import TrainingError


class RunFolder:
    """Paths and files of one run.

    Attributes:
        record: what run.json says of the run.
        progress: the beginning of the run, or its last checkpoint.
        is_continued: whether the folder holds the run already.
        notes: what a person should know of a run that is continued.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = Path(config.out)
        self.run_file = self.path / RUN_FILE
        self.log = MetricsLog(self.path / "metrics.jsonl")
        self.samples_file = self.path / "samples.jsonl"
        self.explanations_file = self.path / "explanations.jsonl"
        self.page_file = self.path / "report.html"
        self.best_file = self.path / "best.safetensors"
        self.checkpoints = CheckpointFolder(self.path / "checkpoints", config.save_total_limit)
        self.record = RunRecord.from_config(config)
        self.progress = Progress()
        self.is_continued = False
        self.start_time = time.monotonic()
        self.notes: list[str] = []
        self._lock: IO[bytes] | None = None

    def check(self, resume: bool) -> None:
        """Check that a run can begin, or be continued, in this folder, and find out how far it is.

        Other processes cannot write to the folder of a run that is continued from then on.

        Args:
            resume: whether there has to be a run to continue.

        Raises:
            ValueError: the folder cannot be written, another run is writing to it, or it holds anything else
                than an unfinished run with these settings.
        """
        check_writable(self.path)
        leftovers = [LOCK_FILE, f"{RUN_FILE}.new"]
        is_empty = not self.path.exists() or all(path.name in leftovers for path in self.path.iterdir())
        if self.run_file.is_file():
            self._read_run()
        elif resume:
            remedy = "leave it out" if is_empty else "name the folder of one"
            raise ValueError(f"--resume needs an unfinished run, but {self.path} holds no run: {remedy}.")
        elif not is_empty:
            raise ValueError(
                "--out should be a new folder, an empty one or that of an unfinished run, but "
                f"{self.path} is not empty: name a new folder."
            )

    def _lock_folder(self) -> None:
        if self._lock is None:
            self._lock = lock_run(self.path)

    def _read_run(self) -> None:
        record = RunRecord.read(self.path)
        if record.status == "finished" and self.page_file.exists():
            raise ValueError(
                f"--out should be a new folder or that of an unfinished run, but the run in {self.path} is "
                "finished: name a new folder."
            )
        record.check_settings(self.record.settings, self.path)
        self._lock_folder()
        record.settings = self.record.settings
        self.record, self.is_continued = record, True
        progress, problems = self.checkpoints.find_newest(record.checkpoint)
        if progress is not None:
            self.progress = progress
            self.notes += [f"a checkpoint is left out: {problem}" for problem in problems]
        elif problems and record.status == "training":
            raise ValueError(
                f"{self.checkpoints.path} should hold a whole checkpoint, but {problems[0]}: put it back, or "
                "name a new folder."
            )

    def check_rows(self, digests: Mapping[str, str]) -> None:
        """Note what the run is trained and evaluated on, by options, such as data.

        Raises:
            ValueError: a run that is continued began with other rows.
        """
        for name, digest in digests.items():
            if self.record.rows.get(name, digest) != digest:
                files = ", ".join(self.record.settings[name])
                raise ValueError(
                    f"the rows should be those that the run began with, but {files} of {flag(name)} has "
                    "changed: put it back, or name a new folder."
                )
        self.record.rows = dict(digests)

    @property
    def needs_training(self) -> bool:
        """Whether steps are left, or the evaluation after the last one, of which there is a checkpoint."""
        status = self.record.status
        return status == "training" or (status == "trained" and self.progress.is_trained)

    @property
    def checkpoint_folder(self) -> Path:
        """The last checkpoint, if there is one."""
        return self.checkpoints.folder(self.progress)

    def open(self) -> None:
        """Create the folder and its settings, or put it back to where the run stands.

        Raises:
            TrainingError: another run has begun in it.
        """
        if not self.is_continued:
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock_folder()
        except ValueError as error:
            raise TrainingError(str(error)) from error
        if self.run_file.exists() and not self.is_continued:
            raise TrainingError(
                f"--out should be a new folder, but another run has begun in {self.path} meanwhile: name "
                "another folder."
            )
        self.record.write(self.path)
        self.checkpoints.remove_unfinished()
        if self.needs_training:
            self._restore_log()
            self.best_file.unlink(missing_ok=True)
            if (file := self.checkpoint_folder / self.best_file.name).exists():
                link_file(file, self.best_file)
        else:
            self.log.cut_unfinished()
            self.notes.append(f"continuing {self.path}: the model is trained, and the report is left")
        self.start_time = time.monotonic() - self.log.last_elapsed_seconds()

    def elapsed_seconds(self) -> float:
        """Time since the run began, without what a resumed run has to do again and without interruptions."""
        return time.monotonic() - self.start_time

    def _restore_log(self) -> None:
        """Take from the log what came after the checkpoint, which will be logged again, and note it."""
        if self.progress == Progress():
            earlier = self.log.set_aside()
            if self.is_continued:
                self.notes.append(f"beginning the run in {self.path} again, for it has no checkpoint")
            if earlier is not None:
                self.notes.append(f"what it had logged is in {earlier.name}")
            return
        step, stage = self.progress.step, self.progress.stage
        place = f"after step {step} of {stage}" if step else f"at the beginning of {stage}"
        self.notes.append(f"continuing {self.path} {place}")
        if num_missing := self.log.cut(self.progress.log_bytes):
            self.notes.append(f"{self.log.file} lacks the last {num_missing} bytes of the run before")

    def set_status(self, status: RunStatus) -> None:
        """Note whether the model is saved and reported."""
        record = replace(self.record, status=status)
        record.write(self.path)
        self.record = record

    def note_reference(self, sentence: str) -> None:
        """Note what the reference is, in words."""
        self.record.reference = sentence
        self.record.write(self.path)

    def note_machine(self, words: str) -> None:
        """Note what the run runs on."""
        self.record.machine = words
        self.record.write(self.path)

    def read_samples(self) -> list[dict[str, Any]]:
        return read_json_lines(self.samples_file)

    @contextmanager
    def new_checkpoint(
        self,
        accelerator: Accelerator,
        stage: StageName,
        step: int,
        *,
        is_evaluated: bool = False,
        is_trained: bool = False,
    ) -> Iterator[Path]:
        """A folder to which all processes write the files of a checkpoint, which is complete afterwards.

        Those before are removed then, but for the last ones.
        """
        progress = Progress(stage, step, self.log.count_bytes(), is_evaluated, is_trained)
        if accelerator.is_main_process:
            self.checkpoints.create_new(progress)
        accelerator.wait_for_everyone()
        yield self.checkpoints.new_folder(progress)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self._complete_checkpoint(progress)
        self.progress = progress

    def _complete_checkpoint(self, progress: Progress) -> None:
        flush_to_disk(self.log.file)
        if self.best_file.exists():
            link_file(self.best_file, self.checkpoints.new_folder(progress) / self.best_file.name)
        self.checkpoints.complete(progress)
        self.record.checkpoint = progress.checkpoint_name
        self.record.write(self.path)
        self.checkpoints.remove_old()

    def find_model(self, stages: Sequence[StageName]) -> str | None:
        """The folder of the model with which a resumed run goes on; None if that is the run's own model.

        Raises:
            ValueError: it is not there.
        """
        number = stages.index(self.progress.stage) if self.progress.stage in stages else 0
        if not number:
            return None
        folder = self.stage_folder(stages[number - 1])
        if not folder.is_dir():
            raise ValueError(
                f"{folder} should hold the model that the stage {self.progress.stage} began with, but it is "
                "not there: put it back, or name a new folder."
            )
        return str(folder)

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
        """An empty folder, of which the disk holds what is written in its context."""
        remove_folder(self.path / name)
        (self.path / name).mkdir()
        yield self.path / name
        flush_folder(self.path / name)

    def finish(self) -> None:
        """Delete what the run would have continued from, and mark it as finished."""
        remove_folder(self.checkpoints.path)
        self.best_file.unlink(missing_ok=True)
        self.record.checkpoint = None
        self.set_status("finished")
        (self.path / LOCK_FILE).unlink(missing_ok=True)

    def unlock(self) -> None:
        """Let another process continue the run."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
