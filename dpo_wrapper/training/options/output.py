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
    best_metric: str = "loss"
    """Eval metric by which the models of preference training are compared: loss, rewards/accuracies,
    rewards/margins or logps/chosen; min:NAME or max:NAME for others. Supervised training takes the loss."""
    early_stopping_patience: int | None = None
    """Number of evaluations in a row without a better --best-metric after which a stage ends."""
    keep_best: bool = False
    """Whether a stage ends with the weights of its best evaluation, instead of the last ones."""
    resume: bool = False
    """Continue an interrupted run in --out, with the settings that it began with."""

    def __post_init__(self) -> None:
        self.check("eval_steps", lambda value: value >= 1, "at least 1")
        self.check("save_steps", lambda value: value >= 0, "0 or more")
        self.check("early_stopping_patience", lambda value: value >= 1, "at least 1")
        parse_best_metric(self.best_metric)
        if self.best_metric != "loss" and not self.compares_evaluations:
            raise ValueError(
                f"--best-metric should be given together with --keep-best or --early-stopping-patience, but "
                f"it is {self.best_metric} alone: add one of them."
            )

    @property
    def compares_evaluations(self) -> bool:
        """Whether the run asks which evaluation was the best."""
        return self.keep_best or self.early_stopping_patience is not None


BEST_METRICS = {"loss": -1, "rewards/accuracies": 1, "rewards/margins": 1, "logps/chosen": 1}
"""Metrics of which it is known whether lower or higher is better: -1 or 1."""


def parse_best_metric(text: str) -> tuple[str, int]:
    """The name of a metric, and 1 if higher is better or -1 if lower is.

    Raises:
        ValueError: it is not known which is better.
    """
    direction, separator, name = text.partition(":")
    if separator and name and direction in ("min", "max"):
        return name, 1 if direction == "max" else -1
    if text not in BEST_METRICS:
        raise ValueError(
            f"--best-metric should be {', '.join(BEST_METRICS)}, min:NAME or max:NAME, but it is {text}: say "
            "which is better."
        )
    return text, BEST_METRICS[text]
