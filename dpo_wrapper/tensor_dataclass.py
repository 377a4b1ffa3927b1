"""Frozen dataclasses of tensors that move between devices as one."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound="Movable")


class Movable:
    """A frozen dataclass of tensors, of tuples of them and of other such; anything else it holds stays."""

    def mapped(self: T, function: Callable[[Tensor], Tensor]) -> T:
        """The same with every tensor replaced."""

        def over(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, Movable):
                return value.mapped(function)
            return tuple(map(over, value)) if isinstance(value, tuple) else value

        return type(self)(*(over(getattr(self, field.name)) for field in fields(self)))  # type: ignore[arg-type]

    def to(self: T, device: torch.device | str) -> T:
        waits = torch.device(device).type == "cpu"  # what comes back must be there before it is read
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=not waits))

    def pin_memory(self: T) -> T:
        """In page-locked memory, as a DataLoader with `pin_memory = True` asks for."""
        return self.mapped(lambda tensor: tensor.pin_memory())
