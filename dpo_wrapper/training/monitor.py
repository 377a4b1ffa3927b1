"""What a person and other programs see of a stage while it runs."""

import sys
from contextlib import AbstractContextManager
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from dpo_wrapper.metrics import format_metric
from dpo_wrapper.training.config import StageName
from dpo_wrapper.training.explanations import Explanations
from dpo_wrapper.training.run_folder import RunFolder


class Monitor(AbstractContextManager["Monitor"]):
    """Logs the metrics of a stage and shows its progress.

    All processes call its methods with the same metrics, and the main process alone writes.

    Args:
        stage: name of the stage.
        unit: what the stage is trained on: pairs, lists, rows, completions or documents.
        num_steps, steps_done: of the stage, and how many of them an earlier run has done.
    """

    def __init__(
        self,
        run: RunFolder,
        accelerator: Accelerator,
        stage: StageName,
        unit: str,
        num_steps: int,
        steps_done: int,
    ) -> None:
        self.run, self.stage, self.unit, self.num_steps = run, stage, unit, num_steps
        self.is_main_process = accelerator.is_main_process
        if self.is_main_process:
            records = [record for record in run.read_records() if record["stage"] == stage]
            self.explanations = Explanations(run.explanations_file, run.settings, num_steps, records)
        self.bar = create_progress_bar(
            accelerator, stage.upper(), "step", total=num_steps, initial=steps_done
        )

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        """Report a training step, which counts from 1."""
        if self.is_main_process:
            self.run.log_metrics(self.stage, "step", step, metrics)
            self.bar.set_postfix_str(format_progress(metrics, self.unit), refresh=False)
            self.bar.update()
            self.explain("step", step, metrics)

    def log_evaluation(self, split: str, step: int, metrics: dict[str, float]) -> None:
        """Report an evaluation after a step; `split` is eval or train."""
        if self.is_main_process:
            self.run.log_metrics(self.stage, split, step, metrics)
            self.explain(split, step, metrics)

    def explain(self, part: str, step: int, metrics: dict[str, float]) -> None:
        """Print what the metrics mean, where it is worth saying and was not said before."""
        for sentence in self.explanations.observe(self.stage, part, step, metrics):
            self.print(sentence)

    def print(self, text: str) -> None:
        """Print text above the progress bar."""
        if self.is_main_process:
            tqdm.write(text)

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def create_progress_bar(accelerator: Accelerator, label: str, unit: str, **options: Any) -> tqdm:
    """The main process's progress bar. In a log file, where each update is a line, updates are rare."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    is_disabled = not accelerator.is_main_process
    return tqdm(desc=label, unit=unit, mininterval=interval, disable=is_disabled, **options)


def format_progress(metrics: dict[str, float], unit: str) -> str:
    """What the progress bar displays beside the step."""
    labels = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
    parts = [
        f"{label} {format_metric('{:.3f}', metrics[name])}"
        for name, label in labels.items()
        if name in metrics
    ]
    return ", ".join([*parts, f"{metrics[f'{unit}/second']:.1f} {unit}/s"])
