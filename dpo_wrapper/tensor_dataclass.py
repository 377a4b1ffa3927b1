"""Frozen dataclasses of tensors: one call moves all of their tensors to a device or into pinned memory."""

import dataclasses
from collections.abc import Callable, Iterator
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

    def iterate_tensors(self) -> Iterator[Tensor]:
        """Every tensor in the fields, those in tuples and in other `TensorDataclass`es among them."""
        values = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]
        while values:
            value = values.pop()
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, TensorDataclass):
                yield from value.iterate_tensors()
            elif isinstance(value, tuple):
                values.extend(value)

    def to(self: T, device: torch.device | str) -> T:
        """The same on `device`, itself if it is there. A copy to the CPU has arrived when this returns."""
        if all(tensor.device == torch.device(device) for tensor in self.iterate_tensors()):
            return self
        is_asynchronous = torch.device(device).type != "cpu"
        moved = self.map_tensors(lambda tensor: tensor.to(device, non_blocking=is_asynchronous))
        if is_asynchronous:
            _remember_on_cpu(moved, self)
        return moved

    @property
    def on_cpu(self: T) -> T:
        """The same on the CPU, whose numbers can be read without waiting for a device.

        It is what `to` has moved from there, or else a copy that is made once.
        """
        if "_on_cpu" not in vars(self):
            if _is_on_cpu(self):
                return self
            vars(self)["_on_cpu"] = self.to("cpu")
        return vars(self)["_on_cpu"]

    def replace(self: T, **changes: Any) -> T:
        """Return a copy with these fields; tensors among them are not replaced in `on_cpu`."""
        result = dataclasses.replace(self, **changes)  # type: ignore[type-var]
        if "_on_cpu" in vars(self):
            kept = {name: value for name, value in changes.items() if not isinstance(value, Tensor)}
            vars(result)["_on_cpu"] = vars(self)["_on_cpu"].replace(**kept)
        return result

    def pin_memory(self: T) -> T:
        """Return a copy in page-locked memory. A `DataLoader` with `pin_memory=True` calls this."""
        return self.map_tensors(lambda tensor: tensor.pin_memory())


def _is_on_cpu(values: TensorDataclass) -> bool:
    """Whether all tensors are on the CPU, those of other dataclasses in it left aside."""
    tensors = (getattr(values, field.name) for field in fields(values))  # type: ignore[arg-type]
    return all(value.device.type == "cpu" for value in tensors if isinstance(value, Tensor))


def _remember_on_cpu(moved: TensorDataclass, source: TensorDataclass) -> None:
    """Let `moved`, and each dataclass in it, know the one on the CPU that it was copied from."""
    if "_on_cpu" in vars(source) or _is_on_cpu(source):
        vars(moved)["_on_cpu"] = source.on_cpu
    for field in fields(moved):  # type: ignore[arg-type]
        if isinstance(value := getattr(moved, field.name), TensorDataclass):
            _remember_on_cpu(value, getattr(source, field.name))
