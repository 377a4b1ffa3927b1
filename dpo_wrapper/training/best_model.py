"""Which evaluation of a stage was the best, and the weights of the model then."""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dpo_wrapper.pretrained import undo_rescaling
from dpo_wrapper.training.checkpoint import load_weights
from dpo_wrapper.training.options.output import parse_best_metric
from dpo_wrapper.training.sharding import whole_weights
from dpo_wrapper.training.state_files import read_state, write_state
from dpo_wrapper.training.stopping import TrainingError


class BestEvaluation:
    """The best evaluation of a stage so far.

    Args:
        metric: as in --best-metric. A stage of supervised training is judged by its loss.
        records: of the evaluations that an earlier run has logged.

    Attributes:
        step: after which step it was; None before the first.
        value: of the metric.
        num_worse: number of evaluations since then.
    """

    def __init__(self, metric: str, stage: str, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self.name, self.sign = parse_best_metric(metric if stage == "dpo" else "loss")
        self.step: int | None = None
        self.value, self.num_worse = math.nan, 0
        for record in records:
            if record["stage"] == stage and record["part"] == "eval":
                self.observe(record["step"], record)

    def observe(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Take an evaluation into account; returns whether it is the best so far.

        Raises:
            TrainingError: it lacks the metric.
        """
        if self.name not in metrics:
            known = ", ".join(name for name in metrics if name not in ("stage", "part", "step"))
            raise TrainingError(
                f"--best-metric should be a metric of the evaluations, but {self.name} is none: begin a new "
                f"run with one of {known}."
            )
        value = metrics[self.name]
        value = math.nan if value is None else value  # as the log has a value that is not finite
        is_better = math.isfinite(value) and not self.sign * value <= self.sign * self.value
        if is_better:
            self.step, self.value, self.num_worse = step, value, 0
        else:
            self.num_worse += 1
        return is_better

    def __str__(self) -> str:
        return f"step {self.step}, with the best eval {self.name} ({self.value:.4g})"


def save_best(model: nn.Module, file: Path, *, is_writer: bool) -> None:
    """Write what trains of a model, and its buffers, whole or not at all.

    Where weights are sharded all processes call this, and one of them is the writer.
    """
    undo_rescaling(model)
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    with whole_weights(model, is_needed=is_writer, names=trained):
        weights = {name: value for name, value in model.state_dict().items() if name in trained | buffers}
    if is_writer:
        write_state(file.with_suffix(".new"), weights)
        os.replace(file.with_suffix(".new"), file)


def load_best(model: nn.Module, file: Path) -> None:
    """Put the weights of the best model into it."""
    undo_rescaling(model)
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    load_weights(model, read_state(file), frozen)
