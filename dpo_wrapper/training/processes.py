"""The processes of a run, and sums over them."""

import os
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from dpo_wrapper.training.config import TrainConfig


def create_accelerator(config: TrainConfig, **options: Any) -> Accelerator:
    """What stands for all processes; options are further ones of `Accelerator`."""
    return Accelerator(mixed_precision=config.precision, cpu=runs_on_cpu(config), **options)


def check_launcher(config: TrainConfig) -> None:
    """Raise ValueError if accelerate's configuration asks for what cannot be, or is an option here."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "accelerate's configuration should shard by FSDP2, but it asks for DeepSpeed, which updates "
            "weights inside of backward and pickles checkpoints: take examples/accelerate/fsdp2.yaml."
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        raise ValueError(
            "accelerate's configuration should not compile the model, for each batch has another shape, but "
            f"its dynamo_backend is {backend}: leave it out, and give --torch-compile."
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", config.precision):
        raise ValueError(
            f"--precision should be {precision}, as accelerate's configuration has it, but it is "
            f"{config.precision}: give --precision {precision}, or leave mixed_precision out."
        )


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


def describe_machine(accelerator: Accelerator) -> str:
    """What each process computes on, and how many there are."""
    device, count = accelerator.device, accelerator.num_processes
    if device.type == "cuda":
        place = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        threads = torch.get_num_threads()
        place = f"{threads} {'core' if threads == 1 else 'cores'} of the CPU"
    else:
        place = device.type
    return place if count == 1 else f"{count} processes with {place} each"
