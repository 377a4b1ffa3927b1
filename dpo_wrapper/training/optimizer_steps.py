"""The optimizer steps of a stage: gradients of micro-batches, sums over processes, an update or none."""

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dpo_wrapper.batches import Reduce
from dpo_wrapper.data import StepSampler
from dpo_wrapper.metrics import MetricSums
from dpo_wrapper.reference.sharding import gather_tensor
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.non_finite import NonFiniteSteps
from dpo_wrapper.training.out_of_memory import advise_on_steps, explain_out_of_memory
from dpo_wrapper.training.processes import sum_over_processes
from dpo_wrapper.training.stages import Stage


class OptimizerSteps:
    """Runs the steps of a stage. A step is the same for any number of micro-batches and processes.

    Args:
        module, optimizer: those of the stage, as accelerate has prepared them.
        sampler: knows how many examples a step has.
        non_finite: what becomes of steps whose loss or gradients are not finite.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        stage: Stage,
        module: nn.Module,
        optimizer: Any,
        sampler: StepSampler,
        non_finite: NonFiniteSteps,
    ) -> None:
        self.config, self.accelerator, self.stage = config, accelerator, stage
        self.module, self.optimizer = module, optimizer
        self.sampler, self.non_finite = sampler, non_finite

    def run(self, step: int, batches: list[Any]) -> dict[str, float]:
        """Run one optimizer step on this process's micro-batches; the metrics are of all processes.

        Raises:
            TrainingError: the loss or the gradients are not finite, and `--on-nan` says to stop; or memory
                does not suffice.
        """
        has_examples = self.accelerator.process_index < self.sampler.step_size(step - 1)

        def reduce(sums: Tensor) -> Tensor:
            return sum_over_processes(self.accelerator, sums if has_examples else torch.zeros_like(sums))

        advise = partial(advise_on_steps, self.config, batches)
        with explain_out_of_memory(f"step {step} of {self.stage.name}", advise):
            metrics = self.compute_gradients(batches, reduce, has_examples)
            self.update_weights(step, metrics, reduce)
        is_counted = self.config.on_nan == "skip"
        return metrics | ({"num_skipped": self.non_finite.num_skipped} if is_counted else {})

    def compute_gradients(self, batches: list[Any], reduce: Reduce, has_examples: bool) -> dict[str, float]:
        """Leave the gradients of a step in the weights, clipped, and return its metrics.

        The loss among them is without that which balances experts, but not finite if the sum of both is not.
        """
        accelerator, stage, sums = self.accelerator, self.stage, MetricSums()
        loss_scale = accelerator.num_processes if has_examples else 0  # DDP takes the mean over processes
        losses: list[Tensor] = []
        batches = stage.normalize_over_step([batch.to(accelerator.device) for batch in batches], reduce)
        for batch in batches:
            with nullcontext() if batch is batches[-1] else accelerator.no_sync(self.module):
                loss, of_batch = stage.micro_batch_loss(self.module, batch)
                accelerator.backward(loss * loss_scale)
            losses.append(loss.detach())
            sums.add(of_batch)
        clipped = accelerator.clip_grad_norm_(self.module.parameters(), self.config.max_grad_norm)
        grad_norm = gather_tensor(clipped)
        total = float(reduce(torch.stack(losses).sum()))
        metrics = {"loss": total, **sums.result(reduce), "grad_norm": float(grad_norm)}
        return metrics if math.isfinite(total) else metrics | {"loss": total}

    def update_weights(self, step: int, metrics: dict[str, float], reduce: Reduce) -> None:
        """Take the optimizer's step. One whose loss or gradients are not finite changes nothing."""
        values = {"loss": metrics["loss"], "norm of the gradients": metrics["grad_norm"]}
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() >= 1:  # it leaves out what overflows at a larger scale
            del values["norm of the gradients"]
        is_skipped = self.non_finite.is_skipped(step, values)
        if not is_skipped:
            self.optimizer.step()
            is_skipped = self.optimizer.step_was_skipped
        elif scaler is not None:
            scaler.update(scaler.get_scale())  # which stays, and is ready for the next step
        self.optimizer.zero_grad(set_to_none=True)
        if is_skipped:
            self.stage.discard_step()
        else:
            self.stage.end_step(step, reduce)
