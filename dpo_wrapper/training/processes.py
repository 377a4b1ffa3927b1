"""Sums over the processes of a run."""

from accelerate import Accelerator
from torch import Tensor


def sum_over_processes(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on the device of this one if there are several."""
    if accelerator.num_processes == 1:  # sums are in float64, which an Apple GPU does not have
        return values
    return accelerator.reduce(values.to(accelerator.device), reduction="sum")
