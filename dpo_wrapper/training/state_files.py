"""Nested states, such as that of an optimizer, in safetensors files: reading one runs no code."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpo_wrapper.libraries.tensor_files import apply_umask
from dpo_wrapper.training.stopping import TrainingError


class CheckpointError(TrainingError):
    """A part of a checkpoint, a file or a folder, cannot be read for this reason."""

    def __init__(self, part: Path, reason: object) -> None:
        super().__init__(
            f"{part} should be part of a checkpoint, but it cannot be read ({reason}): delete this "
            "checkpoint, and the same command continues from the one before, or name a new folder."
        )


@dataclass(frozen=True)
class ShardedEntry:
    """Stands in a state for a sharded tensor, which is in files of its own under this name."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def write_state(file: Path, state: Any) -> None:
    """Write dicts, lists and tuples of tensors, sharded entries, numbers, strings, bools and None.

    A tensor that stands in several places, as tied weights do, is written once.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}

    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            place = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride())
            key = (*place, value.dtype) if value.numel() else (id(value),)
            if key not in names:
                names[key] = str(len(names))
                tensors[names[key]] = _own_copy(value)
            return {"tensor": names[key]}
        if isinstance(value, ShardedEntry):
            return {"sharded": [value.name, list(value.shape), str(value.dtype).removeprefix("torch.")]}
        if isinstance(value, dict):
            return {"dict": [[describe(name), describe(part)] for name, part in value.items()]}
        if isinstance(value, (list, tuple)):
            return {type(value).__name__: [describe(part) for part in value]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"a state should hold tensors, numbers and strings, but it holds {type(value)}.")

    save_file(tensors, str(file), metadata={"state": json.dumps(describe(state))})
    apply_umask(file)


def read_state(file: Path) -> Any:
    """Read what `write_state` wrote, its tensors on the CPU.

    Raises:
        CheckpointError: the file is not there, or it holds no such state.
    """
    try:
        with safe_open(str(file), framework="pt") as opened:
            description = json.loads(opened.metadata()["state"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(file, error) from error

    def rebuild(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "sharded":
            name, shape, dtype = content
            return ShardedEntry(name, tuple(shape), getattr(torch, dtype))
        if kind == "dict":
            return {rebuild(name): rebuild(part) for name, part in content}
        parts = [rebuild(part) for part in content]
        return tuple(parts) if kind == "tuple" else parts

    return rebuild(description)


def _own_copy(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, in memory that holds nothing else."""
    copy = tensor.detach().cpu().contiguous()
    return copy.clone() if copy.untyped_storage().nbytes() != copy.nbytes else copy
