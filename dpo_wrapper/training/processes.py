"""The processes of a run, and sums over them."""

from typing import Any

from accelerate import Accelerator
from torch import Tensor

from dpo_wrapper.training.config import TrainConfig


def create_accelerator(config: TrainConfig, **options: Any) -> Accelerator:
    """What stands for all processes; options are further ones of `Accelerator`."""
    return Accelerator(mixed_precision=config.precision, cpu=config.cpu, **options)


def sum_over_processes(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on the device of this one if there are several."""
    if accelerator.num_processes == 1:  # sums are in float64, which an Apple GPU does not have
        return values
    return accelerator.reduce(values.to(accelerator.device), reduction="sum")
