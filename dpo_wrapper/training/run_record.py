"""What run.json says of a run: its settings, what it was trained on, and how far it is."""

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

from dpo_wrapper.pretrained import RUN_FILE, read_run
from dpo_wrapper.training.config import TrainConfig, flag
from dpo_wrapper.training.files import write_json

CHANGEABLE_SETTINGS = (
    "resume", "out", "save_steps", "save_total_limit", "num_workers", "cpu", "fsdp", "logging_steps",
    "sample_steps", "samples", "report_to", "project", "on_nan", "micro_batch_tokens",
    "gradient_checkpointing",
)  # fmt: skip
"""Settings that may change when a run is continued."""

RunStatus = Literal["training", "trained", "finished"]
"""A run is trained once its model is saved, and finished once it is evaluated and reported as well."""


@dataclass
class RunRecord:
    """The content of run.json.

    Attributes:
        settings: all options by name, with values as JSON has them.
        status: whether the model is saved, and reported.
        run_id: what trackers know the run by.
        today: the day on which the run began, which chat templates may print, in ISO's form.
        reference: what the reference is, in words; None until preference training begins.
        machine: what it ran on last, in words.
        rows: a hash of the rows of each option that names data.
        checkpoint: name of the last checkpoint that was completed.
    """

    settings: dict[str, Any]
    status: RunStatus = "training"
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    today: str = field(default_factory=lambda: date.today().isoformat())
    reference: str | None = None
    machine: str | None = None
    rows: dict[str, str] = field(default_factory=dict)
    checkpoint: str | None = None

    @classmethod
    def from_config(cls, config: TrainConfig) -> "RunRecord":
        """The record of a run that begins."""
        return cls(json.loads(json.dumps(asdict(config), default=str)))

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """The record of the run in a folder.

        Raises:
            ValueError: it cannot be read.
        """
        try:
            return cls(**read_run(folder))
        except TypeError as error:
            raise ValueError(
                f"{folder / RUN_FILE} should hold the settings of a run, but it does not: name a new folder."
            ) from error

    def write(self, folder: Path) -> None:
        """Write run.json completely or not at all."""
        write_json(folder / RUN_FILE, asdict(self), indent=2)

    def check_settings(self, settings: Mapping[str, Any], folder: Path) -> None:
        """Raise ValueError unless the run can be continued with these settings."""
        changed = ", ".join(
            f"{format_setting(name, self.settings.get(name))} (now {format_setting(name, value)})"
            for name, value in settings.items()
            if name not in CHANGEABLE_SETTINGS and value != self.settings.get(name)
        )
        if changed:
            raise ValueError(
                f"a run should be continued with the settings that it began with, but that in {folder} had "
                f"{changed}: give the same, or name a new folder."
            )


def format_setting(name: str, value: Any) -> str:
    """An option with its value, which is as JSON has it, as on the command line."""
    if value is None or value is False:
        return f"no {flag(name)}"
    if value is True:
        return flag(name)
    values = value if isinstance(value, list) else [value]
    return " ".join([flag(name), *(one if isinstance(one, str) else json.dumps(one) for one in values)])
