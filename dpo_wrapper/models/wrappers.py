"""What torch has wrapped, told by the names of classes, so that nothing of it has to be imported."""

from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

from torch import nn


@cache
def wrapper_kind(module_class: Any) -> Literal["checkpoint", "sharded"] | None:
    """What torch does with modules of a class: FSDP shards parameters, others recompute activations."""
    names = {base.__name__ for base in module_class.__mro__}
    if names & {"FSDPModule", "FullyShardedDataParallel"}:
        return "sharded"
    return "checkpoint" if "CheckpointWrapper" in names else None


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP has sharded a part of the model, by `fully_shard` or by its older wrapper.

    It gathers parameters as a module is called, and shards them again later.
    """
    classes: Iterator[Any] = map(type, model.modules())
    return any(wrapper_kind(module_class) == "sharded" for module_class in classes)
