"""The training loop of one stage, from its beginning or from the run folder's checkpoint."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from dpo_wrapper.batches import Reduce
from dpo_wrapper.data import StepSampler, TokenizedExample
from dpo_wrapper.metrics import MetricSums
from dpo_wrapper.training.best_model import BestEvaluation, load_best, save_best
from dpo_wrapper.training.checkpoint import STATE_FILE, FrozenWeights, load_checkpoint, write_checkpoint
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.micro_batches import MicroBatches, make_micro_batches
from dpo_wrapper.training.monitor import Monitor
from dpo_wrapper.training.optimizer import create_optimizer, create_schedule
from dpo_wrapper.training.run_folder import RunFolder
from dpo_wrapper.training.stage_plan import Splits
from dpo_wrapper.training.stages import Stage
from dpo_wrapper.training.stopping import StoppedBySignal, StopRequest, TrainingError, ignore_signals

MAX_TRAIN_EXAMPLES_EVALUATED = 512
"""Number of train examples that are evaluated at both ends of a stage, to see how their log-probs changed."""


class Trainer:
    """Trains the module of one stage in place, and writes metrics and checkpoints to the run folder."""

    def __init__(self, config: TrainConfig, run: RunFolder, stage: Stage, splits: Splits) -> None:
        self.config, self.run, self.stage, self.splits = config, run, stage, splits
        self.accelerator = create_accelerator(config)
        self.sampler = StepSampler(
            len(splits.train),
            config.batch_size,
            stage.epochs,
            config.seed,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        self.num_steps = min(len(self.sampler), config.max_steps or len(self.sampler))
        self.eval_steps = config.eval_steps or max(1, math.ceil(self.num_steps / 8))
        self.rate_of_step = create_schedule(config, stage.learning_rate, self.num_steps)
        optimizer: Any = create_optimizer(stage.module, config, stage.learning_rate, self.accelerator.device)
        self.module, self.optimizer = self.accelerator.prepare(stage.module, optimizer)
        frozen = FrozenWeights(stage.module)
        self.has_saved = False  # a checkpoint, of which the size is said once
        self.checkpointed = (self.accelerator, frozen, self.optimizer, stage.reference_cache)

    def train(self) -> None:
        """Run the steps that are not done yet; eval metrics are logged before, during and after.

        Raises:
            TrainingError: the loss or the norm of the gradients is not finite.
            StoppedBySignal: SIGINT or SIGTERM came; there is a checkpoint.
        """
        progress, num_steps, folder = self.run.progress, self.num_steps, self.run.checkpoint_folder
        is_resumed = progress.stage == self.stage.name and (folder / STATE_FILE).is_file()
        steps_done = progress.step if is_resumed else 0
        if is_resumed:
            load_checkpoint(folder, *self.checkpointed)
        self.probe_model()
        unit = self.splits.unit
        self.monitor = Monitor(self.run, self.accelerator, self.stage.name, unit, num_steps, steps_done)
        records = self.run.read_records() if is_resumed and self.config.compares_evaluations else []
        self.best = BestEvaluation(self.config.best_metric, self.stage.name, records)
        with self.monitor:
            last_step = self.run_steps(steps_done, is_resumed and progress.is_evaluated)
            self.end_with_best(last_step)
        self.accelerator.free_memory()

    def run_steps(self, steps_done: int, is_evaluated: bool) -> int:
        """Run the steps that are not done yet, with what is due after each; returns the last one.

        `is_evaluated` says whether the evaluation after the last of `steps_done` is logged.
        """
        unit = self.splits.unit
        with StopRequest() as stop_request:
            if not is_evaluated:
                self.evaluate_if_due(steps_done)
                self.save_or_stop(steps_done, stop_request, is_evaluated=True)
            for step, batches in enumerate(self.create_step_loader(steps_done), start=steps_done + 1):
                if self.stops_early():
                    return step - 1
                start_time = time.perf_counter()
                learning_rate = self.set_learning_rate(step)
                metrics = self.train_step(step, batches)
                num_examples, seconds = self.sampler.step_size(step - 1), time.perf_counter() - start_time
                metrics[f"{unit}/second"] = num_examples / seconds
                metrics["lr"] = learning_rate
                if self.stage.reference_cache is not None and step * self.stage.epochs == len(self.sampler):
                    self.stage.reference_cache.gather_from_processes()  # once, after the first epoch
                self.monitor.log_step(step, metrics)
                self.save_or_stop(step, stop_request)
                self.evaluate_if_due(step)
                self.save_or_stop(step, stop_request, is_evaluated=True)
        return self.num_steps

    def stops_early(self) -> bool:
        """Whether too many evaluations in a row were no better than the best one."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.best.num_worse >= patience

    def end_with_best(self, last_step: int) -> None:
        """Take the weights of the best evaluation, if that is asked for, and log how the stage ends."""
        splits = self.splits_at_end()
        if last_step < self.num_steps:
            self.monitor.print(
                f"{self.stage.name} stops after step {last_step} of {self.num_steps}: "
                f"{self.best.num_worse} evaluations were no better than {self.best}."
            )
        if self.config.keep_best and self.best.step != last_step:
            self.accelerator.wait_for_everyone()
            load_best(self.stage.scorer.language_model.model, self.run.best_file)
            self.monitor.print(f"{self.stage.name} ends with the weights after {self.best}.")
        elif last_step < self.num_steps:
            splits.pop("eval")
        else:
            return
        for name, examples in splits.items():
            self.evaluate(last_step, name, examples)

    def set_learning_rate(self, step: int) -> float:
        """Set the learning rate of a step, which counts from 1, and return it."""
        learning_rate = self.rate_of_step(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        return learning_rate

    def probe_model(self) -> None:
        """Find out, and say, how the model takes sequences, which decides how batches of them are made."""
        batch = self.stage.collate_fn(self.splits.train[:1]).to(self.accelerator.device)
        try:
            with self.accelerator.autocast():
                self.stage.scorer.check(batch.sequences)
        except (TypeError, ValueError) as error:  # a model that the probe refuses
            raise TrainingError(str(error)) from error
        self.accelerator.print(f"{self.stage.name}: {self.stage.scorer.explain()}")

    def train_step(self, step: int, batches: list[Any]) -> dict[str, float]:
        """Run one optimizer step on this process's micro-batches; the metrics are of all processes."""
        accelerator, stage = self.accelerator, self.stage
        has_examples = accelerator.process_index < self.sampler.step_size(step - 1)
        loss_scale = accelerator.num_processes if has_examples else 0  # DDP takes the mean over processes

        def reduce(sums: Tensor) -> Tensor:
            return self.sum_over_processes(sums * has_examples)

        loss, sums = torch.zeros((), device=accelerator.device), MetricSums()
        batches = stage.normalize_over_step([batch.to(accelerator.device) for batch in batches], reduce)
        for batch in batches:
            with nullcontext() if batch is batches[-1] else accelerator.no_sync(self.module):
                batch_loss, metrics = stage.micro_batch_loss(self.module, batch)
                accelerator.backward(batch_loss * loss_scale)
            loss += batch_loss.detach()
            sums.add(metrics)
        grad_norm = accelerator.clip_grad_norm_(self.module.parameters(), self.config.max_grad_norm)
        total_loss = float(reduce(loss))
        self.check_finite(step, "loss", total_loss)
        scaler = accelerator.scaler
        if scaler is None or scaler.get_scale() < 1:  # steps that overflow at a larger scale are left out
            self.check_finite(step, "norm of the gradients", float(grad_norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        stage.end_step(step, reduce)
        return {"loss": total_loss, **sums.result(reduce), "grad_norm": float(grad_norm)}

    def check_finite(self, step: int, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"the {name} should be finite, but at step {step} of {self.stage.name} it is {value}: begin "
                "a new run with a lower learning rate or --max-grad-norm, or look at the rows of this step."
            )

    def evaluate_if_due(self, step: int) -> None:
        """Log eval metrics at both ends and every `eval_steps`, and train metrics at both ends."""
        is_end = step in (0, self.num_steps)
        if not is_end and step % self.eval_steps:
            return
        for name, examples in self.splits_at_end().items():
            if name == "eval" or is_end:
                metrics = self.evaluate(step, name, examples)
                if name == "eval" and self.config.compares_evaluations:
                    self.compare_evaluation(step, metrics)

    def splits_at_end(self) -> dict[str, Sequence[TokenizedExample]]:
        """What is evaluated at both ends of a stage."""
        splits = {"eval": self.splits.eval, "train": self.splits.train[:MAX_TRAIN_EXAMPLES_EVALUATED]}
        return {name: examples for name, examples in splits.items() if len(examples)}

    def evaluate(self, step: int, name: str, examples: Sequence[TokenizedExample]) -> dict[str, float]:
        """Log and return the metrics of a split's examples."""
        indices = list(range(len(examples)))
        reduce: Reduce | None = None
        if len(examples) >= self.accelerator.num_processes:  # or else every process evaluates all of them
            indices = indices[self.accelerator.process_index :: self.accelerator.num_processes]
            reduce = self.sum_over_processes
        batches = self.micro_batch_maker(examples)(indices)
        batches_there = [batch.to(self.accelerator.device) for batch in batches]
        metrics = self.stage.evaluate(self.module, batches_there, reduce)
        self.monitor.log_evaluation(name, step, metrics)
        self.check_finite(step, f"{name} loss", metrics["loss"])
        return metrics

    def compare_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Note whether an evaluation is the best of the stage, and keep the weights of the best."""
        is_best = self.best.observe(step, metrics)
        if is_best and self.config.keep_best and self.accelerator.is_main_process:
            save_best(self.stage.scorer.language_model.model, self.run.best_file)

    def create_step_loader(self, steps_done: int) -> DataLoader[Any]:
        """This process's micro-batches of each step that is not done yet."""
        return DataLoader(
            self.sampler,  # type: ignore[arg-type]
            batch_size=None,
            sampler=range(steps_done, self.num_steps),
            collate_fn=self.micro_batch_maker(self.splits.train),
            num_workers=self.config.num_workers,
            worker_init_fn=ignore_signals,
            pin_memory=self.accelerator.device.type == "cuda",
            generator=torch.Generator(),  # so that it draws no seed from the global generator
        )

    def micro_batch_maker(self, examples: Sequence[TokenizedExample]) -> Callable[[list[int]], MicroBatches]:
        """The function that makes micro-batches of the examples at some indices. It holds no model."""
        is_padded = self.stage.scorer.tree_options is None
        options = (self.stage.collate_fn, self.config.micro_batch_tokens, is_padded)
        return partial(make_micro_batches, examples, *options)

    def save_or_stop(self, step: int, stop_request: StopRequest, is_evaluated: bool = False) -> None:
        """Write a checkpoint if one is due; after a signal write one and raise StoppedBySignal."""
        number = stop_request.number or 0
        if self.accelerator.num_processes > 1:  # a signal may reach processes in different steps
            numbers = torch.tensor([number], device=self.accelerator.device)
            number = int(self.accelerator.gather(numbers).max())
        save_steps = self.config.save_steps
        is_due = save_steps and step % save_steps == 0 and step < self.num_steps and not is_evaluated
        if number or is_due:
            self.save_checkpoint(step, is_evaluated)
        if number:
            raise StoppedBySignal(number)

    def save_checkpoint(self, step: int, is_evaluated: bool) -> None:
        """Write a checkpoint; the previous one stays until it is complete."""
        if self.accelerator.is_main_process:
            self.run.create_new_checkpoint()
        self.accelerator.wait_for_everyone()
        write_checkpoint(self.run.new_checkpoint_folder, *self.checkpointed)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.run.replace_checkpoint(self.stage.name, step, is_evaluated)
            if not self.has_saved:
                self.monitor.print(describe_checkpoint(self.run.checkpoint_folder, self.config.save_steps))
            self.has_saved = True

    def sum_over_processes(self, values: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:  # sums are in float64, which an Apple GPU does not have
            return values
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")


def describe_checkpoint(folder: Path, save_steps: int) -> str:
    """The size of a checkpoint, in words."""
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    interval = f" every {save_steps} steps" if save_steps else ""
    return f"checkpoint: {size:.{0 if size >= 10 else 1}f} MB{interval} in {folder}"


def create_accelerator(config: TrainConfig) -> Accelerator:
    return Accelerator(mixed_precision=config.precision, cpu=config.cpu)
