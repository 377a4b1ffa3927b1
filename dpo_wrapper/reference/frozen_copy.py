"""Copies of models that read nothing of the original, whatever its modules hold."""

import copy
import types
from collections.abc import Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def frozen_copy(
    model: nn.Module, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> nn.Module:
    """A copy in eval mode, without gradients, that shares storage for parameters that do not train.

    One with a dtype or a device of its own shares nothing, and is not first made where the model is.
    """

    def converted(tensor: Tensor) -> Tensor:
        to = dtype if tensor.is_floating_point() else None
        return tensor.detach().to(device or tensor.device, to or tensor.dtype, copy=True)

    if dtype is None and device is None:
        memo: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    else:
        memo = {id(b): converted(b) for b in model.buffers() if type(b) is Tensor}
        memo |= {
            id(p): nn.Parameter(converted(p), False) for p in model.parameters() if type(p) is nn.Parameter
        }
    copied = copy_with_closures(model, model, memo)
    if any(hasattr(module, "__deepcopy__") for module in model.modules()):
        pairs = zip(model.state_dict().values(), copied.state_dict().values(), strict=True)
        if copied is model or not all(torch.equal(converted(old), converted(new)) for old, new in pairs):
            raise ValueError(
                "the model's own __deepcopy__ gives no copy with the same weights: give a separately built "
                "model as reference = module."
            )
    return copied.requires_grad_(False).eval().to(device, dtype)


def copy_with_closures(value: T, model: nn.Module, memo: dict[int, Any]) -> T:
    """`deepcopy` of the model or of what it holds, that leaves nothing reading the original.

    `deepcopy` leaves functions as they are. One that a module holds (a lambda as output head, say) and that
    closes over a part of the model would go on reading the original, so such functions are made anew around
    the copy. And it refuses tensors that were computed, like those that hooks compute from parameters
    (`weight_norm`, pruning); they are copied as the numbers they are.
    """
    held = [thing for module in model.modules() for thing in vars(module).values()]
    memo |= {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf}
    parts = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
    remade = []
    for function in list(closures_over(parts, held)):
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        new = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
        memo[id(function)] = new
        remade.append((function, new))
    copied = copy.deepcopy(value, memo)
    for function, new in remade:
        new.__defaults__ = copy.deepcopy(function.__defaults__, memo)
        new.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__, memo)
        new.__dict__.update(copy.deepcopy(function.__dict__, memo))
        for old_cell, new_cell in zip(function.__closure__ or (), new.__closure__ or (), strict=True):
            for content in contents(old_cell):
                new_cell.cell_contents = copy.deepcopy(content, memo) if reaches(content, parts) else content
    return copied


def contents(cell: types.CellType) -> tuple[Any, ...]:
    """What a closure's cell holds: one value, or none if it has not been filled yet."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


def held_by(value: object) -> tuple[Any, ...]:
    """What a function, method, partial or container holds."""
    if isinstance(value, types.FunctionType):
        cells = (content for cell in value.__closure__ or () for content in contents(cell))
        return (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    if isinstance(value, types.MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return tuple(value)
    if isinstance(value, dict):
        return tuple(value.values())
    return ()


def reaches(value: object, parts: set[int]) -> bool:
    """Whether a part of the model is held by `value`, however deep."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if id(value) in parts:
            return True
        if id(value) not in seen:
            seen.add(id(value))
            waiting.extend(held_by(value))
    return False


def closures_over(parts: set[int], held: list[Any]) -> Iterator[types.FunctionType]:
    """Functions among what is held, however deep, that reach a part of the model."""
    seen: set[int] = set()
    waiting = list(held)
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (nn.Module, Tensor)):
            continue
        seen.add(id(value))
        waiting.extend(held_by(value))
        if isinstance(value, types.FunctionType) and reaches(value, parts):
            yield value
