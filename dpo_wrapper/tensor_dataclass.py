"""Frozen dataclasses of tensors: one call moves all of their tensors to a device or into pinned memory."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound="TensorDataclass")


class TensorDataclass:
    """Base of frozen dataclasses whose fields hold tensors, tuples of tensors or other `TensorDataclass`es.

    Fields of any other type are kept as they are.
    """

    def map_tensors(self: T, function: Callable[[Tensor], Tensor]) -> T:
        """Return a copy in which `function` has replaced every tensor."""

        def map_value(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, TensorDataclass):
                return value.map_tensors(function)
            return tuple(map(map_value, value)) if isinstance(value, tuple) else value

        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        return type(self)(**{name: map_value(getattr(self, name)) for name in names})

    def to(self: T, device: torch.device | str) -> T:
        """Return a copy on `device`. A copy to the CPU has arrived when this returns."""
        is_asynchronous = torch.device(device).type != "cpu"
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=is_asynchronous))

    def pin_memory(self: T) -> T:
        """Return a copy in page-locked memory. A `DataLoader` with `pin_memory=True` calls this."""
        return self.map_tensors(lambda tensor: tensor.pin_memory())
