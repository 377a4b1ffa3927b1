"""The training loop: optimizer steps of one stage, from wherever the run folder's checkpoint stands."""

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dpo_wrapper.data.collate import group_by_tokens
from dpo_wrapper.data.examples import TokenizedExample
from dpo_wrapper.metrics import MetricSums
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.run_folder import RunFolder
from dpo_wrapper.training.stages import Prepare, Stage

T = TypeVar("T")

TRAINING_SAMPLE = 512
"""How many training entries are evaluated before and after a stage, to see what became of their log-probs."""


def step_indices(n: int, batch_size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """The rows of each step: each epoch takes each of the `n` rows once, in an order set by the seed."""
    for epoch in range(epochs):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 100_003 + epoch)).tolist()
        yield from (order[start : start + batch_size] for start in range(0, n, batch_size))


def steps_in(n: int, batch_size: int, epochs: int) -> int:
    return epochs * math.ceil(n / batch_size)


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear rise over the first `warmup` of the steps, then a cosine to zero."""
    rise = math.ceil(steps * warmup)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


@dataclass(frozen=True)
class Parts:
    """What is trained on and what is held out; `unit` says what they are: pairs, lists or rows."""

    training: Sequence[TokenizedExample]
    held_out: Sequence[TokenizedExample]
    unit: str


class MicroBatches(Dataset[list[Any]]):
    """Of each list of rows, its entries in micro-batches, ready for a stage."""

    def __init__(
        self, entries: Sequence[TokenizedExample], rows: Sequence[list[int]], prepare: Prepare, most: int
    ) -> None:
        self.entries, self.rows, self.prepare, self.most = entries, rows, prepare, most

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Any]:
        entries = [self.entries[k] for k in self.rows[index]]
        return [self.prepare([entries[k] for k in group]) for group in group_by_tokens(entries, self.most)]


class Loop:
    """Runs stages and writes what happens to the run folder."""

    def __init__(self, config: TrainConfig, run: RunFolder) -> None:
        self.config, self.run = config, run

    def accelerator(self) -> Accelerator:
        return Accelerator(mixed_precision=self.config.precision, cpu=self.config.cpu)

    def stage(self, stage: Stage, data: Parts, epochs: int, lr: float) -> None:
        """Train `stage.module` in place; held-out metrics are logged before, during and after."""
        config, run = self.config, self.run
        accelerator = self.accelerator()
        steps = steps_in(len(data.training), config.batch_size, epochs)
        trained = [p for p in stage.module.parameters() if p.requires_grad]
        optimizer: Any = torch.optim.AdamW(trained, lr=lr, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, steps, config.warmup)
        )
        module, optimizer = accelerator.prepare(stage.module, optimizer)
        accelerator.register_for_checkpointing(schedule)
        if stage.memory is not None:
            accelerator.register_for_checkpointing(stage.memory)

        done = 0
        if run.progress.stage == stage.name and run.progress.step:
            accelerator.load_state(str(run.checkpoint))
            done = run.progress.step
        else:
            self.evaluate(accelerator, stage, module, data, 0, ends=True)

        every = config.eval_every or max(1, math.ceil(steps / 8))
        order = step_indices(len(data.training), config.batch_size, epochs, config.seed)
        quiet = not accelerator.is_main_process
        often = 0.2 if sys.stderr.isatty() else 10.0  # a bar in a log file is a line each time
        with tqdm(
            total=steps, initial=done, desc=stage.title, unit="step", mininterval=often, disable=quiet
        ) as bar:
            left = list(order)[done:]
            prepared = self.prepared(accelerator, stage, data.training, left)
            for step, (rows, batches) in enumerate(zip(left, prepared, strict=True), start=done + 1):
                began = time.perf_counter()
                values = self.step(accelerator, stage, module, optimizer, rows, batches)
                values[f"{data.unit}/second"] = len(rows) / (time.perf_counter() - began)
                values["lr"] = float(schedule.get_last_lr()[0])
                schedule.step()
                stage.after(step)
                if stage.memory is not None and step * epochs == steps:  # each process has seen its share
                    stage.memory.exchange()
                if accelerator.is_main_process:
                    run.log(stage.name, "step", step, values)
                    bar.set_postfix_str(progress(values, data.unit), refresh=False)
                    bar.update()
                if step % every == 0 or step == steps:
                    self.evaluate(accelerator, stage, module, data, step, ends=step == steps)
                if config.save_every and step % config.save_every == 0 and step < steps:
                    self.save(accelerator, stage, step)
        accelerator.free_memory()

    def prepared(
        self,
        accelerator: Accelerator,
        stage: Stage,
        entries: Sequence[TokenizedExample],
        steps: Sequence[list[int]],
    ) -> DataLoader[Any]:
        """This process's micro-batches of each step, made by other processes if there are workers."""
        # with fewer items than processes, a process still takes part in reducing gradients, with weight 0
        mine = [rows[accelerator.process_index :: accelerator.num_processes] or rows[:1] for rows in steps]
        return DataLoader(
            MicroBatches(entries, mine, stage.prepares(), self.config.max_tokens),
            batch_size=None,
            collate_fn=identity,
            num_workers=self.config.workers,
            pin_memory=accelerator.device.type == "cuda",
            generator=torch.Generator(),  # leaves the one that training draws from alone
        )

    def step(
        self,
        accelerator: Accelerator,
        stage: Stage,
        module: Any,
        optimizer: Any,
        rows: list[int],
        batches: list[Any],
    ) -> dict[str, float]:
        """One optimizer step over the entries `rows`, of which this process has its share in `batches`."""
        mine = accelerator.process_index < len(rows)
        weight = accelerator.num_processes if mine else 0

        def reduce(sums: Tensor) -> Tensor:
            return reduce_over(accelerator, sums * (weight > 0))

        loss, sums = torch.zeros((), device=accelerator.device), MetricSums()
        parts = stage.as_one_step(module, batches, accelerator.device, reduce)
        for k, part in enumerate(parts):
            last = k == len(parts) - 1
            context: AbstractContextManager[Any] = nullcontext() if last else accelerator.no_sync(module)
            with context:
                share, metrics = stage.share(module, part.to(accelerator.device))
                accelerator.backward(share * weight)
            loss += share.detach()
            sums.add(metrics)
        norm = accelerator.clip_grad_norm_(module.parameters(), self.config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        stage.end_step(reduce)
        return {"loss": float(reduce(loss)), **sums.result(reduce), "grad_norm": float(norm)}

    def evaluate(
        self,
        accelerator: Accelerator,
        stage: Stage,
        module: Any,
        data: Parts,
        step: int,
        *,
        ends: bool = False,
    ) -> None:
        """Log metrics of the held-out part and, at the ends of a stage, of (some of) the training part."""
        parts = {"held-out": data.held_out, **({"training": data.training} if ends else {})}
        for name, entries in parts.items():
            count = len(entries) if name == "held-out" else min(len(entries), TRAINING_SAMPLE)
            if not count:
                continue
            rows = list(range(count))
            reduce: Callable[[Tensor], Tensor] = partial(reduce_over, accelerator)
            if count < accelerator.num_processes:  # too few for a share each: every process takes all of them
                reduce = identity
            else:
                rows = rows[accelerator.process_index :: accelerator.num_processes]
            batches = MicroBatches(entries, [rows], stage.prepares(), self.config.max_tokens)[0]
            values = stage.held_out(module, [batch.to(accelerator.device) for batch in batches], reduce)
            if accelerator.is_main_process:
                self.run.log(stage.name, name, step, values)

    def save(self, accelerator: Accelerator, stage: Stage, step: int) -> None:
        new = self.run.path / "checkpoint.new"
        if accelerator.is_main_process:
            shutil.rmtree(new, ignore_errors=True)
        accelerator.wait_for_everyone()
        # not as safetensors, which would tear apart what policy and reference share
        accelerator.save_state(str(new), safe_serialization=False)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.run.replace_checkpoint(new, stage.name, step)


def identity(value: T) -> T:
    return value


def reduce_over(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Sum over processes."""
    return accelerator.reduce(values.to(accelerator.device), reduction="sum")


def progress(values: dict[str, float], unit: str) -> str:
    """What the bar shows."""
    shown = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
    parts = [f"{label} {values[name]:.3f}" for name, label in shown.items() if name in values]
    return ", ".join([*parts, f"{values[f'{unit}/second']:.1f} {unit}/s"])
