"""The processes of a run, and sums over them."""

from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

from dpo_wrapper.training.config import TrainConfig


def create_accelerator(config: TrainConfig, **options: Any) -> Accelerator:
    """What stands for all processes; options are further ones of `Accelerator`."""
    return Accelerator(mixed_precision=config.precision, cpu=runs_on_cpu(config), **options)


def join_processes(config: TrainConfig) -> PartialState:
    """The number of processes, and the device of this one; they form a group from now on."""
    return PartialState(cpu=runs_on_cpu(config))


def runs_on_cpu(config: TrainConfig) -> bool:
    """Whether a run is on the CPU. accelerate has to be told: otherwise each process would be one alone."""
    return config.cpu or not torch.accelerator.is_available()


def sum_over_processes(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on the device of this one if there are several."""
    if accelerator.num_processes == 1:  # sums are in float64, which an Apple GPU does not have
        return values
    return accelerator.reduce(values.to(accelerator.device), reduction="sum")
