"""Models whose parameters are spread over processes, which all have to run them at the same time."""

from typing import Any

import torch
from torch import nn

FSDP_CLASSES = ("FSDPModule", "FullyShardedDataParallel")


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP has sharded a part of the model, by `fully_shard` or by its older wrapper."""
    return any(base.__name__ in FSDP_CLASSES for m in model.modules() for base in type(m).__mro__)


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
