"""Sharded tensors of a state, in safetensors files that any number of processes reads."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_wrapper.reference.sharding import is_sharded_tensor
from dpo_wrapper.training.state_files import CheckpointError, ShardedEntry

Place = tuple[Any, ...]
"""The keys under which a value stands in a nested state."""


def take_sharded(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """The state with an entry in place of each sharded tensor, and these tensors by name.

    A tensor that stands in several places is one.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[Place, str] = {}

    def take(value: Any, place: Place) -> Any:
        if not is_sharded_tensor(value):
            return value
        local = value.to_local()
        key = (local.untyped_storage()._cdata, local.storage_offset(), value.shape)
        if key not in names:
            names[key] = ".".join(map(str, place))
            tensors[names[key]] = value
        return ShardedEntry(names[key], tuple(value.shape), value.dtype)

    return map_values(state, take), tensors


def map_values(value: Any, function: Callable[[Any, Place], Any], place: Place = ()) -> Any:
    """A nested state with what a function makes of each value and its place."""
    if isinstance(value, dict):
        return {key: map_values(part, function, (*place, key)) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_values(part, function, (*place, k)) for k, part in enumerate(value))
    return function(value, place)


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write what each process has of sharded tensors; all processes call this.

    Raises:
        OSError: a process cannot write.
    """
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter, save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:  # of any process
        reason = next(iter(error.failures.values()))[0]
        raise OSError(getattr(reason, "errno", None), str(reason)) from error


def read_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, sharded or whole ones, from the files that `write_shards` wrote; all processes call this.

    Raises:
        CheckpointError: the files cannot be read, or do not hold these tensors.
    """
    from torch.distributed import is_initialized
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, load

    reader = HuggingFaceStorageReader(str(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of one process alone
            load(tensors, storage_reader=reader, no_dist=not is_initialized())
    except (CheckpointException, OSError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(folder, reason) from error


def empty_like_entry(entry: ShardedEntry, target: Any) -> Tensor:
    """A tensor to read an entry into: sharded as a parameter is, if it is, or else whole."""
    if not is_sharded_tensor(target):
        return torch.empty(entry.shape, dtype=entry.dtype)
    from torch.distributed.tensor import Replicate, empty

    has_its_shape = tuple(target.shape) == entry.shape
    placements = target.placements if has_its_shape else [Replicate()] * target.device_mesh.ndim
    options: Any = {"device_mesh": target.device_mesh, "placements": placements}
    return empty(entry.shape, dtype=entry.dtype, **options)
