"""The training loop of one stage, from its beginning or from the run folder's checkpoint."""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dpo_wrapper.batches import Reduce
from dpo_wrapper.data import TokenizedExample
from dpo_wrapper.data.collate import group_by_tokens
from dpo_wrapper.metrics import MetricSums
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.run_folder import RunFolder
from dpo_wrapper.training.stages import CollateFn, Stage

T = TypeVar("T")

MAX_TRAIN_EXAMPLES_EVALUATED = 512
"""Number of train examples that are evaluated at both ends of a stage, to see how their log-probs changed."""


@dataclass(frozen=True)
class Splits:
    """Examples to train and to evaluate on; `unit` is what they are: pairs, lists or rows."""

    train: Sequence[TokenizedExample]
    eval: Sequence[TokenizedExample]
    unit: str


class MicroBatchDataset(Dataset[list[Any]]):
    """The micro-batches of each step, given the indices of the step's examples."""

    def __init__(
        self,
        examples: Sequence[TokenizedExample],
        steps: Sequence[list[int]],
        collate_fn: CollateFn,
        micro_batch_tokens: int,
    ) -> None:
        self.examples, self.steps = examples, steps
        self.collate_fn, self.micro_batch_tokens = collate_fn, micro_batch_tokens

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> list[Any]:
        examples = [self.examples[index] for index in self.steps[step]]
        groups = group_by_tokens(examples, self.micro_batch_tokens)
        return [self.collate_fn([examples[index] for index in group]) for group in groups]


class Trainer:
    """Trains the module of one stage in place, and writes metrics and checkpoints to the run folder."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        stage: Stage,
        splits: Splits,
        *,
        epochs: int,
        learning_rate: float,
    ) -> None:
        self.config, self.run, self.stage, self.splits = config, run, stage, splits
        self.epochs = epochs
        self.steps = list(step_indices(len(splits.train), config.batch_size, epochs, config.seed))
        self.eval_steps = config.eval_steps or max(1, math.ceil(len(self.steps) / 8))

        self.accelerator = create_accelerator(config)
        parameters = [p for p in stage.module.parameters() if p.requires_grad]
        optimizer: Any = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=config.weight_decay)
        num_steps = len(self.steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, num_steps, config.warmup_ratio)
        )
        self.module, self.optimizer = self.accelerator.prepare(stage.module, optimizer)
        self.accelerator.register_for_checkpointing(self.schedule)
        if stage.reference_cache is not None:
            self.accelerator.register_for_checkpointing(stage.reference_cache)

    def train(self) -> None:
        """Run the steps that are not done yet; eval metrics are logged before, during and after."""
        steps_done = self.load_checkpoint()
        if not steps_done:
            self.evaluate(0)
        with self.create_progress_bar(steps_done) as bar:
            loader = self.create_step_loader(self.steps[steps_done:])
            for step, batches in enumerate(loader, start=steps_done + 1):
                indices = self.steps[step - 1]
                start_time = time.perf_counter()
                metrics = self.train_step(indices, batches)
                metrics[f"{self.splits.unit}/second"] = len(indices) / (time.perf_counter() - start_time)
                metrics["lr"] = float(self.schedule.get_last_lr()[0])
                self.schedule.step()
                self.stage.on_step_end(step)
                self.share_reference_cache(step)
                if self.accelerator.is_main_process:
                    self.run.log_metrics(self.stage.name, "step", step, metrics)
                    bar.set_postfix_str(format_progress(metrics, self.splits.unit), refresh=False)
                    bar.update()
                if step % self.eval_steps == 0 or step == len(self.steps):
                    self.evaluate(step)
                save_steps = self.config.save_steps
                if save_steps and step % save_steps == 0 and step < len(self.steps):
                    self.save_checkpoint(step)
        self.accelerator.free_memory()

    def train_step(self, indices: list[int], batches: list[Any]) -> dict[str, float]:
        """One optimizer step.

        Args:
            indices: the step's examples, over all processes.
            batches: this process's micro-batches of them.
        """
        accelerator, stage = self.accelerator, self.stage
        has_examples = accelerator.process_index < len(indices)
        loss_scale = accelerator.num_processes if has_examples else 0  # DDP takes the mean over processes

        def reduce(sums: Tensor) -> Tensor:
            return self.sum_over_processes(sums * has_examples)

        loss, sums = torch.zeros((), device=accelerator.device), MetricSums()
        batches = stage.normalize_over_step(batches, accelerator.device, reduce)
        for batch in batches:
            with nullcontext() if batch is batches[-1] else accelerator.no_sync(self.module):
                batch_loss, metrics = stage.micro_batch_loss(self.module, batch.to(accelerator.device))
                accelerator.backward(batch_loss * loss_scale)
            loss += batch_loss.detach()
            sums.add(metrics)
        grad_norm = accelerator.clip_grad_norm_(self.module.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        stage.end_step(reduce)
        return {"loss": float(reduce(loss)), **sums.result(reduce), "grad_norm": float(grad_norm)}

    def evaluate(self, step: int) -> None:
        """Log eval metrics and, at both ends of the stage, train metrics."""
        splits = {"eval": self.splits.eval}
        if step in (0, len(self.steps)):
            splits["train"] = self.splits.train[:MAX_TRAIN_EXAMPLES_EVALUATED]
        for name, examples in splits.items():
            if not examples:
                continue
            indices = list(range(len(examples)))
            reduce: Reduce = identity
            if len(examples) >= self.accelerator.num_processes:  # or else every process evaluates all of them
                indices = indices[self.accelerator.process_index :: self.accelerator.num_processes]
                reduce = self.sum_over_processes
            batches = [
                batch.to(self.accelerator.device) for batch in self.make_dataset(examples, [indices])[0]
            ]
            metrics = self.stage.evaluate(self.module, batches, reduce)
            if self.accelerator.is_main_process:
                self.run.log_metrics(self.stage.name, name, step, metrics)

    def create_step_loader(self, steps: Sequence[list[int]]) -> DataLoader[Any]:
        """This process's micro-batches of each step."""
        rank, num_processes = self.accelerator.process_index, self.accelerator.num_processes
        # A process without an example takes part in reducing gradients with one of loss 0.
        local_steps = [indices[rank::num_processes] or indices[:1] for indices in steps]
        return DataLoader(
            self.make_dataset(self.splits.train, local_steps),
            batch_size=None,
            collate_fn=identity,
            num_workers=self.config.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            generator=torch.Generator(),  # so that it draws no seed from the global generator
        )

    def make_dataset(
        self, examples: Sequence[TokenizedExample], steps: Sequence[list[int]]
    ) -> MicroBatchDataset:
        return MicroBatchDataset(examples, steps, self.stage.collate_fn, self.config.micro_batch_tokens)

    def create_progress_bar(self, steps_done: int) -> tqdm:
        return tqdm(
            total=len(self.steps),
            initial=steps_done,
            desc=self.stage.title,
            unit="step",
            mininterval=progress_interval(),
            disable=not self.accelerator.is_main_process,
        )

    def share_reference_cache(self, step: int) -> None:
        """After the first epoch, give every process the log-probs that the others computed."""
        if self.stage.reference_cache is not None and step * self.epochs == len(self.steps):
            self.stage.reference_cache.exchange()

    def load_checkpoint(self) -> int:
        """Load the checkpoint of this stage, if there is one; the number of steps that it had done."""
        progress = self.run.progress
        if progress.stage != self.stage.name or not progress.step:
            return 0
        self.accelerator.load_state(str(self.run.checkpoint_folder))
        return progress.step

    def save_checkpoint(self, step: int) -> None:
        if self.accelerator.is_main_process:
            self.run.create_new_checkpoint()
        self.accelerator.wait_for_everyone()
        # safetensors would save a parameter that policy and reference share as two
        self.accelerator.save_state(str(self.run.new_checkpoint_folder), safe_serialization=False)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.run.replace_checkpoint(self.stage.name, step)

    def sum_over_processes(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")


def create_accelerator(config: TrainConfig) -> Accelerator:
    return Accelerator(mixed_precision=config.precision, cpu=config.cpu)


def step_indices(num_examples: int, batch_size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """The examples of each step: an epoch takes each example once, in an order that depends on the seed."""
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        order = torch.randperm(num_examples, generator=generator).tolist()
        yield from (order[start : start + batch_size] for start in range(0, num_examples, batch_size))


def learning_rate_factor(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Linear rise over the first `warmup_ratio` of the steps, then a cosine to zero."""
    warmup_steps = math.ceil(num_steps * warmup_ratio)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, num_steps - warmup_steps)))


def progress_interval() -> float:
    """Seconds between updates of a progress bar, each of which is a line of its own in a log file."""
    return 0.2 if sys.stderr.isatty() else 10.0


def format_progress(metrics: dict[str, float], unit: str) -> str:
    """What the progress bar displays beside the step."""
    labels = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
    parts = [f"{label} {metrics[name]:.3f}" for name, label in labels.items() if name in metrics]
    return ", ".join([*parts, f"{metrics[f'{unit}/second']:.1f} {unit}/s"])


def identity(value: T) -> T:
    return value
