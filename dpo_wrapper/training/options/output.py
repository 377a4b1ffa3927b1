"""Options of the run folder: what is written to it, and when."""

from dataclasses import dataclass
from pathlib import Path

from dpo_wrapper.training.options.base import Options


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Options):
    """Where results are written, and how often a run is evaluated and saved."""

    out: Path = Path("runs/dpo")
    """Run folder, where the results are written. It must be new or empty, unless --resume is given."""
    eval_steps: int | None = None
    """Number of steps between evaluations; by default an eighth of all steps."""
    save_steps: int = 200
    """Number of steps between checkpoints; 0 for none but the one that SIGINT or SIGTERM asks for."""
    resume: bool = False
    """Continue an interrupted run in --out, with the settings that it began with."""

    def __post_init__(self) -> None:
        self.check("eval_steps", lambda value: value >= 1, "at least 1")
        self.check("save_steps", lambda value: value >= 0, "0 or more")
