"""What a person and other programs see of a stage while it runs."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from accelerate import Accelerator
from tqdm import tqdm

from dpo_wrapper.display.terminal import create_progress_bar, print_line
from dpo_wrapper.metrics import MetricSums
from dpo_wrapper.training.config import StageName
from dpo_wrapper.training.explanations import Explanations
from dpo_wrapper.training.monitoring.figure import Figure
from dpo_wrapper.training.monitoring.memory import measure_peak_memory
from dpo_wrapper.training.monitoring.report_line import (
    count_examples,
    format_duration,
    format_evaluation_line,
    format_step_line,
)
from dpo_wrapper.training.monitoring.time_left import TimeLeft
from dpo_wrapper.training.monitoring.trackers import Trackers
from dpo_wrapper.training.run_folder import RunFolder
from dpo_wrapper.training.schedule import Schedule

STEP_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"
"""The format of the bar of steps: what tqdm itself says of the time left is of the steps alone."""


class MeasuredProgress:
    """The progress of something between two steps: a bar, and what is called after each advance of it."""

    def __init__(self, bar: tqdm, on_update: Callable[[], object] | None) -> None:
        self.bar, self.on_update = bar, on_update

    def update(self, number: int = 1) -> None:
        """Advance by a number of units."""
        self.bar.update(number)
        if self.on_update is not None:
            self.on_update()


class Monitor(AbstractContextManager["Monitor"]):
    """Logs the metrics of a stage, prints lines of them and shows its progress.

    All processes call its methods with the same metrics, and the main process alone writes.

    Args:
        stage: name of the stage.
        unit: what the stage is trained on: pairs, lists, rows, completions or documents.
        schedule: of the stage.
        steps_done: steps that an earlier run has done.
        trackers: other programs that get the metrics.
        step_offset: number of steps of the stages before, so that trackers have one axis for all of them.

    Attributes:
        on_update: called after each advance of what is measured between two steps; it may raise.
    """

    def __init__(
        self,
        run: RunFolder,
        accelerator: Accelerator,
        stage: StageName,
        unit: str,
        schedule: Schedule,
        steps_done: int,
        trackers: Trackers,
        step_offset: int,
    ) -> None:
        self.run, self.accelerator, self.stage, self.unit = run, accelerator, stage, unit
        self.schedule, self.steps_done = schedule, steps_done
        self.trackers, self.step_offset = trackers, step_offset
        self.on_update: Callable[[], object] | None = None
        self.is_main_process = accelerator.is_main_process
        self.time_left = TimeLeft(schedule)
        if self.is_main_process:
            records = [record for record in run.log.read() if record["stage"] == stage]
            self.explanations = Explanations(
                run.explanations_file, run.record.settings, schedule.num_steps, records
            )
            evaluations = [record for record in records if record["part"] != "step"]
            self.time_left.seconds |= {record["part"]: record["seconds"] for record in evaluations}
        self.figure = Figure(run)
        self.forget_steps()
        self.bar = create_progress_bar(
            stage.upper(),
            "step",
            is_main_process=self.is_main_process,
            total=schedule.num_steps,
            initial=steps_done,
            bar_format=STEP_BAR,
        )

    def forget_steps(self) -> None:
        """Begin with the steps of the next line."""
        self.sums, self.seconds_since_line = MetricSums(), 0.0

    def log_step(self, step: int, metrics: dict[str, float], num_examples: int, seconds: float) -> None:
        """Report a training step, which counts from 1.

        Args:
            metrics: of the step, over all processes.
            num_examples: of the step, over all processes.
            seconds: that it took, without evaluation and saving.
        """
        if not self.is_main_process:
            return
        times = {
            "seconds": seconds,
            f"{self.unit}/second": num_examples / seconds,
            **self.measure_speed(metrics, seconds),
        }
        self.log("step", step, metrics | times)
        self.time_left.step_seconds.append(seconds)
        if math.isfinite(metrics["loss"]):
            self.sums.add_values(metrics)
            self.seconds_since_line += seconds
        left = format_duration(self.time_left.estimate(step))
        self.bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {left} left", refresh=False)
        self.bar.update()
        if step == self.steps_done + 1 or self.schedule.is_due(self.schedule.logging_steps, step):
            self.print_steps(step)
        self.explain("step", step, metrics)

    def print_steps(self, step: int) -> None:
        """Print a line of the steps since the last one, of those with a finite loss if there are any."""
        recent = self.sums.result()
        if recent:
            recent |= self.measure_speed(recent, self.seconds_since_line)
            left = self.time_left.estimate(step)
            print_line(format_step_line(self.stage, step, self.schedule.num_steps, recent, left))
        self.forget_steps()

    def measure_speed(self, metrics: dict[str, float], seconds: float) -> dict[str, float]:
        """Tokens per second, and memory, where so many seconds were needed for these metrics."""
        return {
            "unique_tokens/second": metrics["tokens/unique"] / seconds,
            "padded_tokens/second": metrics["tokens/padded"] / seconds,
            "memory_gb": measure_peak_memory(self.accelerator.device),
        }

    def log_evaluation(self, split: str, step: int, metrics: dict[str, float], num_examples: int) -> None:
        """Report an evaluation after a step on so many examples of a split, eval or train."""
        if self.is_main_process:
            seconds = self.time_left.seconds[split]
            self.log(split, step, metrics | {"seconds": seconds})
            place = (self.stage, step, self.schedule.num_steps)
            where = count_examples(num_examples, f"{split} {self.unit}")
            print_line(format_evaluation_line(*place, metrics, where, seconds))

            self.explain(split, step, metrics)
            self.figure.draw_if_cheap()

    def explain(self, part: str, step: int, metrics: dict[str, float]) -> None:
        """Print what the metrics mean, where it is worth saying and was not said before."""
        for sentence in self.explanations.observe(self.stage, part, step, metrics):
            print_line(sentence)

    def log(self, part: str, step: int, metrics: dict[str, float]) -> None:
        values = metrics | {"elapsed_seconds": self.run.elapsed_seconds()}
        self.run.log.append(self.stage, part, step, values)
        self.trackers.log(self.stage, part, self.step_offset + step, values)

    @contextmanager
    def measure(
        self, name: str, label: str, unit: str = "", total: int | None = None
    ) -> Iterator[MeasuredProgress]:
        """Time something between two steps, and show its progress in a bar of its own.

        Args:
            name: what `TimeLeft` knows it by.
            label: what is done, in words.
            unit, total: of the bar, which is to be updated; without a total only the label is seen.
        """
        start = time.perf_counter()
        options = {"is_main_process": self.is_main_process, "total": total, "leave": False}
        with create_progress_bar(label, unit, **options) as bar:
            yield MeasuredProgress(bar, self.on_update)
        self.time_left.seconds[name] = time.perf_counter() - start

    def print(self, text: str) -> None:
        """Print text above the bars."""
        if self.is_main_process:
            print_line(text)

    def __exit__(self, *_: object) -> None:
        self.bar.close()
