"""Copies of models that read nothing of the original, whatever its modules hold."""

import copy
import copyreg
import re
import types
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpo_wrapper.models.wrappers import is_sharded

ROTARY = re.compile("rotary|rope|polar", re.IGNORECASE)
"""In the names of modules, or of their classes, that turn positions into angles."""


def frozen_copy(
    model: nn.Module, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> nn.Module:
    """A copy in eval mode, without gradients, that shares storage for parameters that do not train.

    A copy with a dtype or a device of its own shares nothing, and its parameters are converted one by one.
    Frequencies of positions keep their dtype: in bfloat16, positions beyond 256 would coincide. ValueError if
    the model cannot be copied.
    """

    def convert(tensor: Tensor) -> Tensor:
        new_dtype = dtype if tensor.is_floating_point() else None
        return tensor.detach().to(device or tensor.device, new_dtype or tensor.dtype, copy=True)

    if is_sharded(model):
        raise ValueError(
            "a policy should be whole when a reference is copied from it, but FSDP has sharded it: make DPO "
            "before sharding, or give reference = module."
        )
    if dtype is None and device is None:
        memo: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    else:
        memo = {id(b): convert(b) for b in model.buffers() if type(b) is Tensor}
        plain = [p for p in model.parameters() if type(p) is nn.Parameter]
        memo |= {id(p): nn.Parameter(convert(p), False) for p in plain}
    try:
        copied = copy_with_closures(model, model, memo)
    except Exception as error:  # whatever a module's code may raise
        raise ValueError(
            f"the model should be one that can be copied, but it raises {type(error).__name__} ({error}): "
            "give a separately built model as reference = module."
        ) from error
    if any(hasattr(module, "__deepcopy__") for module in model.modules()):
        pairs = zip(model.state_dict().values(), copied.state_dict().values(), strict=True)
        if copied is model or not all(torch.equal(convert(old), convert(new)) for old, new in pairs):
            raise ValueError(
                "the model's own __deepcopy__ gives no copy with the same weights: give a separately built "
                "model as reference = module."
            )
    copied = copied.requires_grad_(False).to(device, dtype)
    for module in copied.modules():
        module.training = False  # no call of eval(), in which some layers merge adapters into shared weights
    if dtype is not None:
        keep_frequencies(model, copied)
    return copied


def keep_frequencies(model: nn.Module, copied: nn.Module) -> None:
    """Give a copy in another dtype the frequencies of the model's positions in their own.

    What is added to hidden states is cast to their dtype; rotary embeddings cast by themselves.
    """
    for name, module in model.named_modules():
        is_rotary = ROTARY.search(f"{name.rpartition('.')[2]} {type(module).__name__}") is not None
        if is_rotary or "inv_freq" in module._buffers:
            twin = copied.get_submodule(name)
            for key, buffer in module.named_buffers(recurse=False):
                new = twin._buffers[key]
                twin._buffers[key] = buffer.detach().to(None if new is None else new.device, copy=True)
            if not is_rotary:
                twin.register_forward_hook(cast_output)


def cast_output(module: nn.Module, arguments: Any, output: Any) -> Any:
    """A hook that casts a module's output to the dtype of its parameters."""
    parameter = next(module.parameters(), None)
    return output if parameter is None else output.to(parameter.dtype)


def copy_with_closures(value: Any, model: nn.Module, memo: dict[int, Any]) -> Any:
    """`deepcopy` of the model, or of what holds it, whose functions read the copy and not the original.

    `deepcopy` does not copy functions. A function that a module holds (a lambda as output head, say) and that
    closes over a part of the model would go on reading the original, so it is rebuilt around the copy.
    `deepcopy` also refuses tensors that are no leaves, such as the weights that hooks compute (`weight_norm`,
    pruning); they are copied as numbers. It makes no instance of a class whose `__new__` wants arguments, as
    a layer of x-transformers does; such modules are filled in by hand.
    """
    attributes = [attribute for module in model.modules() for attribute in vars(module).values()]
    memo |= {id(t): t.detach().clone() for t in attributes if isinstance(t, Tensor) and not t.is_leaf}
    model_ids = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
    functions = [f for f in iterate_references(attributes) if isinstance(f, types.FunctionType)]
    rebuilt = []
    for function in (f for f in functions if reaches(f, model_ids)):
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        new = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
        memo[id(function)] = new
        rebuilt.append((function, new))
    unmade = [module for module in model.modules() if wants_arguments(module)]
    memo |= {id(module): object.__new__(type(module)) for module in unmade}
    copied = copy.deepcopy(value, memo)
    for module in unmade:
        reduced: Any = module.__reduce_ex__(4)
        memo[id(module)].__setstate__(copy.deepcopy(reduced[2], memo))
    for function, new in rebuilt:
        new.__defaults__ = copy.deepcopy(function.__defaults__, memo)
        new.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__, memo)
        new.__dict__.update(copy.deepcopy(function.__dict__, memo))
        for old_cell, new_cell in zip(function.__closure__ or (), new.__closure__ or (), strict=True):
            for content in cell_contents(old_cell):
                reads_model = reaches(content, model_ids)
                new_cell.cell_contents = copy.deepcopy(content, memo) if reads_model else content
    return copied


def wants_arguments(module: nn.Module) -> bool:
    """Whether `deepcopy` would call a `__new__` of the module's class, without the arguments it may want."""
    if type(module).__new__ is object.__new__ or hasattr(module, "__deepcopy__"):
        return False
    reduced: Any = module.__reduce_ex__(4)
    return reduced[0] is copyreg.__newobj__ and len(reduced[1]) == 1  # type: ignore[attr-defined]


def cell_contents(cell: types.CellType) -> tuple[Any, ...]:
    """What a closure's cell holds: one value, or none if it has not been filled yet."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


def referenced_values(value: object) -> tuple[Any, ...]:
    """What a function, method, partial or container holds."""
    if isinstance(value, types.FunctionType):
        closed_over = (content for cell in value.__closure__ or () for content in cell_contents(cell))
        return (*closed_over, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    if isinstance(value, types.MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return tuple(value)
    return tuple(value.values()) if isinstance(value, dict) else ()


def iterate_references(roots: list[Any]) -> Iterator[Any]:
    """The roots and all that they hold, however deep, but nothing inside modules and tensors."""
    visited: set[int] = set()
    queue = list(roots)
    while queue:
        value = queue.pop()
        if id(value) not in visited:
            visited.add(id(value))
            yield value
            queue.extend(referenced_values(value))


def reaches(value: object, model_ids: set[int]) -> bool:
    """Whether a value holds a part of the model, however deep."""
    return any(id(reference) in model_ids for reference in iterate_references([value]))
