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
    """Run folder, where the results are written. It must be new or empty, unless --resume is given."""
    logging_steps: Annotated[int | None, tyro.conf.arg(aliases=["--log-every"])] = None
    """Number of steps between lines on the terminal, which tell of all steps since the last one; by default
    there are about 20 lines a stage. metrics.jsonl has a line for every step."""
    eval_steps: Annotated[int | None, tyro.conf.arg(aliases=["--eval-every"])] = None
    """Number of steps between evaluations. By default a stage is evaluated at both ends, and up to 7 times
    between them: 10 steps or more apart, and on no more examples than are trained on."""
    save_steps: Annotated[int, tyro.conf.arg(aliases=["--save-every"])] = 200
    """Number of steps between checkpoints, of which the newest is kept; the last is written before the final
    evaluation. 0 for none but the one that SIGINT or SIGTERM asks for."""
    sample_steps: Annotated[int, tyro.conf.arg(aliases=["--sample-every"])] = 0
    """Number of steps between samples: completions of reference and policy for the same prompts, side by
    side, on the terminal and in samples.jsonl; 0 for the end of the run alone."""
    samples: int = 3
    """Number of prompts that completions are sampled for; 0 for none."""
    exact_answers: int = 100
    """Number of eval prompts that are answered greedily before and after preference training, to see how many
    answers equal the chosen completion; 0 for none. Answers are compared only where nearly all chosen
    completions have at most 32 tokens."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Programs that show metrics while a run goes on; each must be installed."""
    project: str = "dpo-wrapper"
    """The project (experiment) that they show the run in."""
    resume: bool = False
    """Continue an interrupted run in --out, with the settings that it began with."""

    def __post_init__(self) -> None:
        self.check("eval_steps", lambda value: value >= 1, "at least 1")
        self.check("logging_steps", lambda value: value >= 1, "at least 1")
        for name in ("save_steps", "sample_steps", "samples", "exact_answers"):
            self.check(name, lambda value: value >= 0, "0 or more")
        if self.sample_steps and not self.samples:
            raise ValueError("--samples should be at least 1 for --sample-steps, but it is 0: leave it out.")
