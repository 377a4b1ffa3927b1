"""What happens between the steps of a stage: evaluations, and samples."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from accelerate import Accelerator
from torch import nn

from dpo_wrapper.batches import Reduce
from dpo_wrapper.data import TokenizedExample
from dpo_wrapper.evaluation.samples import format_samples
from dpo_wrapper.models.wrappers import is_sharded
from dpo_wrapper.pretrained import undo_rescaling
from dpo_wrapper.training.micro_batches import MicroBatches
from dpo_wrapper.training.monitoring.monitor import Monitor
from dpo_wrapper.training.monitoring.samples import Samples
from dpo_wrapper.training.processes import sum_over_processes
from dpo_wrapper.training.schedule import Schedule
from dpo_wrapper.training.sharding import call_gathered, equalize_batches, reshard
from dpo_wrapper.training.stage_plan import Splits
from dpo_wrapper.training.stages import Stage
from dpo_wrapper.training.stopping import check_finite

MAX_SAMPLE_CHARS = 160
"""Of a text of a sample that is printed during a stage."""


class Evaluator:
    """Evaluates the model of a stage, and samples from it, where the schedule says so.

    Args:
        module: that of the stage, perhaps wrapped (by DDP).
        make_batches: makes micro-batches of examples, as a function of their indices.
        samples: of the stage; None for none. Where weights are whole, the main process alone has any.
        is_last_stage: whether samples are due at the end of the stage, even if `--sample-steps` is 0.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        stage: Stage,
        splits: Splits,
        schedule: Schedule,
        monitor: Monitor,
        make_batches: Callable[[Sequence[TokenizedExample]], Callable[[list[int]], MicroBatches]],
        samples: Samples | None,
        is_last_stage: bool,
    ) -> None:
        self.accelerator, self.module, self.stage, self.splits = accelerator, module, stage, splits
        self.schedule, self.monitor, self.make_batches = schedule, monitor, make_batches
        self.samples, self.is_last_stage = samples, is_last_stage

    def evaluate_if_due(self, step: int) -> dict[str, float] | None:
        """Evaluate and sample where that is due; returns the metrics of eval, if it was evaluated."""
        is_end = self.schedule.is_end(step)
        metrics = None
        if is_end or self.schedule.is_due(self.schedule.eval_steps, step):
            metrics = self.evaluate_splits(step, is_end)
        if self.are_samples_due(step):
            self.sample(step, is_end)
        return metrics

    def evaluate_end(self, step: int) -> None:
        """Evaluate and sample as after the last step, where a stage stops early or takes other weights."""
        self.evaluate_splits(step, is_end=True)
        if self.are_samples_due(self.schedule.num_steps):
            self.sample(step, is_end=True)

    def evaluate_splits(self, step: int, is_end: bool) -> dict[str, float] | None:
        """Log metrics of eval and, at an end of the stage, of train; returns those of eval."""
        metrics = None
        if self.splits.eval:
            metrics = self.evaluate(step, "eval", self.splits.eval, needs_answers=is_end)
        if is_end:
            self.evaluate(step, "train", self.splits.train[: self.schedule.max_train_evaluated])
        return metrics

    def evaluate(
        self, step: int, name: str, examples: Sequence[TokenizedExample], needs_answers: bool = False
    ) -> dict[str, float]:
        """Log and return the metrics of the examples of a split.

        `needs_answers` says whether the model is asked for exact answers as well.
        """
        indices = list(range(len(examples)))
        reduce: Reduce | None = None
        if len(examples) >= self.accelerator.num_processes:  # or else every process evaluates all of them
            indices = indices[self.accelerator.process_index :: self.accelerator.num_processes]
            reduce = partial(sum_over_processes, self.accelerator)
        batches: list[Any] = self.make_batches(examples)(indices)
        label = f"evaluating {name} {self.splits.unit}"
        with self.monitor.measure(name, label, "batch", len(batches)) as bar:
            batches = equalize_batches(self.accelerator, self.stage, batches, examples)
            on_device = [batch.to(self.accelerator.device) for batch in batches]
            metrics = self.stage.evaluate(self.module, on_device, reduce, bar.update)
        reshard(self.module)
        if needs_answers and (self.accelerator.is_main_process or is_sharded(self.module)):
            metrics |= self.measure_exact_answers()
        self.monitor.log_evaluation(name, step, metrics, len(examples))
        check_finite(self.stage.name, step, f"{name} loss", metrics["loss"])
        return metrics

    def measure_exact_answers(self) -> dict[str, float]:
        """How many prompts the model answers exactly, as a metric; nothing if it is not asked."""
        answers, model = self.stage.exact_answers, self.stage.model
        if answers is None:
            return {}
        label = "answering eval prompts"
        measured = self.monitor.measure("answers", label, "prompt", len(answers.examples))
        with measured as bar, self.accelerator.autocast():
            rate = call_gathered(self.module, lambda: answers.measure_rate(model, progress=bar.update))
        undo_rescaling(model)
        return {"exact_answers": rate, "exact_answers/prompts": len(answers.examples)}

    def are_samples_due(self, step: int) -> bool:
        """Whether this process should sample after a step."""
        if self.samples is None or not self.samples.prompts:
            return False
        interval = self.schedule.sample_steps
        is_due = self.schedule.is_due(interval, step) and (interval > 0 or self.is_last_stage)
        return is_due or (step == 0 and self.samples.needs_start)

    def sample(self, step: int, is_end: bool) -> None:
        """Write completions of the same prompts to the run folder, and print them but for the last ones."""
        samples = self.samples
        assert samples is not None
        total = samples.count_completions()
        measured = self.monitor.measure("sample", "writing samples", "completion", total)
        with measured as bar, self.accelerator.autocast():
            records = call_gathered(self.module, lambda: samples.take(step, bar.update))
        undo_rescaling(self.stage.model)
        if not samples.is_writer:
            return
        if not is_end:
            self.monitor.print(f"\n{format_samples(records, MAX_SAMPLE_CHARS)}\n")
        lengths = samples.measure_lengths(records)
        if "length/reference" in lengths:
            self.monitor.explain("samples", step, lengths)
