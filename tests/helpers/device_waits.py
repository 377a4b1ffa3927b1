"""A device that does not exist, on the CPU: it counts how often the host has to wait for it.

`DeviceTensor` claims another device than the CPU, but its numbers lie on the CPU. Operations compute the same
numbers as there; those for which a host waits for an accelerator's result are counted, with the line of the
package that asked.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
"""The only one beside the CPU on which torch differentiates everywhere."""

WAITING = {
    "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "item", "masked_select", "nonzero",
    "unique_consecutive", "unique_dim",
}  # fmt: skip
"""Operations whose result, or its shape, has to be known on the host."""

waits: Counter[str] = Counter()
"""What was waited for, by operation and line."""


class DeviceTensor(Tensor):
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "DeviceTensor":
        return Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.inner!r})"

    def tolist(self) -> Any:  # which torch refuses for subclasses
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU, and count it if a host would wait for the device."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    is_on_device = any(isinstance(x, DeviceTensor) for x in tensors)
    target = kwargs.get("device")
    name = func.overloadpacket.__name__
    if "device" in kwargs:
        goes_to_device = target == DEVICE or (target is None and is_on_device)
        kwargs = kwargs | {"device": torch.device("cpu")}
    else:
        goes_to_device = is_on_device
    if is_on_device or goes_to_device:
        count_wait(name, args, kwargs, is_on_device, goes_to_device)
    inner_args, inner_kwargs = tree_map(unwrap, (args, kwargs))
    result = func(*inner_args, **inner_kwargs)
    if not goes_to_device:
        return result
    given = {id(unwrap(x)): x for x in tensors if isinstance(x, DeviceTensor)}
    return tree_map(lambda x: given[id(x)] if id(x) in given else wrap(x), result)


def unwrap(x: Any) -> Any:
    return x.inner if isinstance(x, DeviceTensor) else x


def wrap(x: Any) -> Any:
    return DeviceTensor(x) if type(x) is Tensor else x


def count_wait(
    name: str, args: Any, kwargs: dict[str, Any], is_on_device: bool, goes_to_device: bool
) -> None:
    indices = args[1] if name.startswith(("index", "_index_put", "_unsafe_index")) and len(args) > 1 else ()
    has_mask = isinstance(indices, (list, tuple)) and any(
        isinstance(index, Tensor) and index.dtype == torch.bool for index in indices
    )
    crosses = is_on_device != goes_to_device and name in ("_to_copy", "copy_")
    is_synchronous = not kwargs.get("non_blocking", False)
    repeats = name == "repeat_interleave" and kwargs.get("output_size") is None
    if name in WAITING or has_mask or repeats or (crosses and (is_synchronous or not goes_to_device)):
        frames = [f for f in traceback.extract_stack() if "/dpo_wrapper/" in f.filename]
        where = (
            f"{frames[-1].filename.split('/dpo_wrapper/')[-1]}:{frames[-1].lineno}" if frames else "outside"
        )
        waits[f"{name} at {where}"] += 1


class _FactoryMode(TorchDispatchMode):
    """Tensors that are made on the device, from none that is there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


@contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """Within, the device exists, and waits for it are counted."""
    make_tensor = torch.tensor

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        made = make_tensor(data, **kwargs)  # torch moves it where a mode does not see it
        return made if device is None else made.to(device)

    def is_autocast_enabled(device: str = "cpu") -> bool:
        return False

    waits.clear()
    with (
        _FactoryMode(),
        patch.object(torch, "tensor", tensor),
        patch.object(torch, "is_autocast_enabled", is_autocast_enabled),
        patch.object(torch, "get_autocast_dtype", lambda device: torch.bfloat16),
        patch.object(torch, "autocast", lambda *_, **__: nullcontext()),
    ):
        yield waits


def move_module(module: nn.Module) -> nn.Module:
    """Move the parameters and buffers of a module to the device, shared ones staying shared."""
    moved: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                value = DeviceTensor(parameter.detach())
                new = nn.Parameter(value, requires_grad=parameter.requires_grad)
                part._parameters[name] = moved.setdefault(id(parameter), new)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = DeviceTensor(buffer)
    return module
