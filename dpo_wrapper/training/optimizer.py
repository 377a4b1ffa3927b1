"""The optimizer of a stage, and how its learning rate changes."""

import importlib
import inspect
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dpo_wrapper.training.config import TrainConfig

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Devices on which torch updates all parameters by one kernel, where they are floats."""


def create_optimizer(
    module: nn.Module, config: TrainConfig, learning_rate: float, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of the parameters that train, on the device where they will be.

    Weights of two dimensions or more decay, embeddings among them; biases and norms do not.

    Raises:
        ValueError: there is no such optimizer, or it does not take the options or the parameters.
        ImportError: its library is not installed.
    """
    optimizer_class = find_optimizer(config.optimizer)
    options = {"lr": learning_rate, **parse_json_options(config.optimizer_args)}
    is_decayed = find_decayed(module)
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters if is_decayed[p]]}]
    groups.append({"params": [p for p in parameters if not is_decayed[p]]})
    if has_parameter(optimizer_class, "weight_decay"):
        options["weight_decay"] = config.weight_decay
        groups[1]["weight_decay"] = 0.0
    elif config.weight_decay:
        raise ValueError(
            f"--optimizer {config.optimizer} should have a weight decay for --weight-decay "
            f"{config.weight_decay}, but it has none: leave --weight-decay out."
        )
    if optimizer_class is torch.optim.AdamW and "foreach" not in options:
        can_fuse = device.type in FUSED_DEVICES and all(p.is_floating_point() for p in parameters)
        options.setdefault("fused", can_fuse)
    try:
        return optimizer_class([group for group in groups if group["params"]], **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"--optimizer {config.optimizer} should take its options and the parameters that train, but it "
            f"refuses them ({error}): change --optimizer-args, or take another optimizer."
        ) from error


def find_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The class of that name: adamw, or a dotted one such as torch.optim.SGD.

    Raises:
        ValueError: there is no such class, or the loop cannot run it.
        ImportError: its library is not installed.
    """
    if name == "adamw":
        return torch.optim.AdamW
    problem = f"--optimizer should be adamw or the dotted name of a class, but {name}"
    module_name, _, class_name = name.rpartition(".")
    try:
        optimizer_class: Any = (
            getattr(importlib.import_module(module_name), class_name, None) if module_name else None
        )
    except ImportError as error:
        library = name.partition(".")[0]
        raise ImportError(
            f"{problem} cannot be imported ({error}): pip install {library}, or correct the name."
        ) from error
    if not inspect.isclass(optimizer_class):
        raise ValueError(f"{problem} is none: take one like torch.optim.SGD or bitsandbytes.optim.AdamW8bit.")
    if not issubclass(optimizer_class, torch.optim.Optimizer):
        raise ValueError(f"{problem} is no torch.optim.Optimizer: take one like torch.optim.SGD.")
    closure = inspect.signature(optimizer_class.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{problem} computes the loss several times a step: take one that needs it once, such as adamw."
        )
    if hasattr(optimizer_class, "eval"):
        raise ValueError(
            f"{problem} trains other weights than it evaluates (by its eval()): take one that does not, such "
            "as adamw."
        )
    return optimizer_class


def has_parameter(optimizer_class: type, name: str) -> bool:
    """Whether a class takes an argument of that name."""
    parameters = inspect.signature(optimizer_class).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def find_decayed(module: nn.Module) -> dict[nn.Parameter, bool]:
    """For each parameter whether it decays: weights do, biases and what a norm holds do not."""
    is_decayed = {}
    for owner in module.modules():
        for name, p in owner.named_parameters(recurse=False):
            is_norm = "norm" in f"{type(owner).__name__} {name}".lower()
            is_decayed[p] = p.ndim >= 2 and not is_norm and not name.endswith("bias")
    return is_decayed


def parse_json_options(text: str | None) -> dict[str, Any]:
    """Keyword arguments from the JSON of an option; lists become tuples."""
    options = json.loads(text or "{}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def create_schedule(config: TrainConfig, learning_rate: float, num_steps: int) -> Callable[[int], float]:
    """The learning rate of a step, which counts from 1, of `num_steps`.

    The schedules are those of transformers, where the first step has a rate of zero. Here step k of a warm-up
    of n steps has k/n of the peak, and what follows begins at the peak.

    Raises:
        ValueError: the schedule does not take its options.
    """
    from transformers import get_scheduler

    num_warmup_steps = math.ceil(num_steps * config.warmup_ratio)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
    options = parse_json_options(config.lr_scheduler_args)
    try:
        scheduler: Any = get_scheduler(
            config.lr_scheduler, optimizer, num_warmup_steps, num_steps, scheduler_specific_kwargs=options
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"--lr-scheduler {config.lr_scheduler} should take its options, but it refuses them ({error}): "
            "change --lr-scheduler-args."
        ) from error

    def rate_of_step(step: int) -> float:
        if step == num_warmup_steps:
            return learning_rate
        is_warmup = step < num_warmup_steps
        return learning_rate * float(scheduler.lr_lambdas[0](step if is_warmup else step - 1))

    return rate_of_step
