"""Options of the run folder: what is written to it, and when."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dpo_wrapper.training.options.base import Options


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Options):
    """Where results are written, and how often a run is evaluated and saved."""

    out: Path = Path("runs/dpo")
    """Run folder, where the results are written. It must be new or empty, or hold an unfinished run with the
    same settings, which is continued."""
    logging_steps: Annotated[int | None, tyro.conf.arg(aliases=["--log-every"])] = None
    """Number of steps between lines on the terminal, which tell of all steps since the last one; by default
    there are about 20 lines a stage. metrics.jsonl has a line for every step."""
    eval_steps: Annotated[int | None, tyro.conf.arg(aliases=["--eval-every"])] = None
    """Number of steps between evaluations. By default a stage is evaluated at both ends, and up to 7 times
    between them: 10 steps or more apart, and on at most half as many examples as are trained on."""
    save_steps: Annotated[int, tyro.conf.arg(aliases=["--save-every"])] = 200
    """Number of steps between checkpoints; the last is written before the final evaluation. 0 for none but
    the one that SIGINT or SIGTERM asks for."""
    save_total_limit: Annotated[int, tyro.conf.arg(aliases=["--keep-checkpoints"])] = 1
    """Number of checkpoints that are kept, the newest ones. With AdamW a checkpoint has three times the size
    of the weights that train, four times with --keep-best. While one is written there is one more."""
    sample_steps: Annotated[int, tyro.conf.arg(aliases=["--sample-every"])] = 0
    """Number of steps between samples: completions of reference and policy for the same prompts, side by
    side, on the terminal and in samples.jsonl; 0 for the end of the run alone."""
    samples: int = 3
    """Number of prompts that completions are sampled for; 0 for none."""
    exact_answers: int = 100
    """Number of eval prompts that are answered greedily before and after preference training, to see how many
    answers equal the chosen completion; 0 for none. Answers are compared only where nearly all chosen
    completions have at most 32 tokens."""
    best_metric: str = "loss"
    """Eval metric by which the models of preference training are compared: loss, rewards/accuracies,
    rewards/margins or logps/chosen; min:NAME or max:NAME for others. Supervised training takes the loss."""
    early_stopping_patience: int | None = None
    """Number of evaluations in a row without a better --best-metric after which a stage ends."""
    keep_best: bool = False
    """Whether a stage ends with the weights of its best evaluation, instead of the last ones."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Programs that show metrics while a run goes on; each must be installed."""
    project: str = "dpo-wrapper"
    """The project (experiment) that they show the run in."""
    resume: bool = False
    """Insist on an unfinished run in --out to continue. Without it, one is continued if there is one."""

    def __post_init__(self) -> None:
        self.check("eval_steps", lambda value: value >= 1, "at least 1")
        self.check("logging_steps", lambda value: value >= 1, "at least 1")
        self.check("save_total_limit", lambda value: value >= 1, "at least 1")
        for name in ("save_steps", "sample_steps", "samples", "exact_answers"):
            self.check(name, lambda value: value >= 0, "0 or more")
        if self.sample_steps and not self.samples:
            raise ValueError("--samples should be at least 1 for --sample-steps, but it is 0: leave it out.")
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
