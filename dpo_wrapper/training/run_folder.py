"""The run folder: settings, the log of metrics, and the checkpoint that an interrupted run goes on from.

config.json         how it was trained (and, once done, what model it is)
metrics.jsonl       one line for each step and evaluation
curves.png          the same, drawn
reference/          the reference's log-probs, if they are computed ahead
sft/                the model after the warm-up, where preference training starts
checkpoint/         the latest state, while the run is under way
model.safetensors   the trained policy, when the run is done
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_wrapper.training.config import TrainConfig

Record = dict[str, Any]
FREE = ("resume", "out", "save_every", "cpu")
"""Options that may differ when a run is resumed."""


@dataclass(frozen=True)
class Progress:
    """How far a run is: `step` steps of `stage` are done, and the log was `log_bytes` long then."""

    stage: str = "sft"
    step: int = 0
    log_bytes: int = 0


class RunFolder:
    def __init__(self, config: TrainConfig) -> None:
        self.path = Path(config.out)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.curves = self.path / "curves.png"
        self.sft = self.path / "sft"
        self.reference = self.path / "reference"
        self.checkpoint = self.path / "checkpoint"
        self.settings = config.as_json()
        self.progress = Progress()

    def check(self, resume: bool) -> None:
        """Raise ValueError if the folder cannot be begun, or cannot be resumed with these settings."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--out {self.path} is a file: name a new folder.")
        if not resume:
            if self.path.exists() and any(self.path.iterdir()):
                raise ValueError(
                    f"--out {self.path} is not empty: name a new folder, or add --resume to go on."
                )
            return
        if not self.config.is_file():
            raise ValueError(f"--resume: {self.path} holds no run that could go on.")
        before = json.loads(self.config.read_text(encoding="utf-8")).get("dpo_wrapper", {})
        changed = [key for key in self.settings if key not in FREE and self.settings[key] != before.get(key)]
        if changed:
            was = ", ".join(f"--{key.replace('_', '-')} {before.get(key)}" for key in changed)
            raise ValueError(f"--resume goes on with the settings the run began with, but it had {was}.")
        if (self.path / "model.safetensors").exists():
            raise ValueError(f"--resume: the run in {self.path} is finished.")
        if (self.checkpoint / "progress.json").is_file():
            self.progress = Progress(
                **json.loads((self.checkpoint / "progress.json").read_text(encoding="utf-8"))
            )

    def open(self) -> None:
        """Begin the folder, or take the log back to where the checkpoint stands."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.config.write_text(json.dumps({"dpo_wrapper": self.settings}, indent=2) + "\n", encoding="utf-8")
        self.metrics.touch()
        with self.metrics.open("r+b") as log:
            log.truncate(self.progress.log_bytes)

    def log(self, stage: str, part: str, step: int, values: dict[str, float]) -> None:
        with self.metrics.open("a", encoding="utf-8") as log:
            log.write(json.dumps({"stage": stage, "part": part, "step": step, **values}) + "\n")

    def records(self) -> list[Record]:
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]

    def pass_to(self, stage: str) -> None:
        """Note that the stages before are done; their model is in the folder."""
        new = self.path / "checkpoint.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        self.replace_checkpoint(new, stage, 0)

    def replace_checkpoint(self, new: Path, stage: str, step: int) -> None:
        """Put a complete checkpoint in the place of the one before, so that there is always a whole one."""
        self.progress = Progress(stage, step, self.metrics.stat().st_size)
        (new / "progress.json").write_text(json.dumps(asdict(self.progress)), encoding="utf-8")
        old = self.path / "checkpoint.old"
        shutil.rmtree(old, ignore_errors=True)
        if self.checkpoint.exists():
            self.checkpoint.rename(old)
        new.rename(self.checkpoint)
        shutil.rmtree(old, ignore_errors=True)

    def drop_checkpoint(self) -> None:
        shutil.rmtree(self.checkpoint, ignore_errors=True)
