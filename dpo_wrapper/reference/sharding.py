"""Processes over which parameters are spread, which all have to run a model at the same time."""

from typing import Any

import torch
from torch import Tensor, nn


def is_true_everywhere(is_true: bool, model: nn.Module) -> bool:
    """Whether something holds in all processes over which the model's parameters are sharded."""
    groups: dict[Any, str] = {}
    for parameter in model.parameters():
        mesh: Any = getattr(parameter, "device_mesh", None)
        if mesh is not None:
            groups |= {mesh.get_group(k): mesh.device_type for k in range(mesh.ndim)}
    module: Any
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            groups[module.process_group] = module.compute_device.type
    for group, device in groups.items():
        flag = torch.tensor(int(is_true), device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=group)
        is_true = bool(flag)
    return is_true


def is_sharded_tensor(value: object) -> bool:
    """Whether a value is a tensor of which each process has a part."""
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def gather_tensor(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, whole; all processes call this."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded_tensor(tensor) else tensor
