"""The files of a checkpoint: what changed of the module, optimizer and random states.

Frozen weights are not in it: they are those of the model as it is loaded, of which a checksum is kept.
"""

import random
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dpo_wrapper.models.wrappers import is_sharded
from dpo_wrapper.pretrained import undo_rescaling
from dpo_wrapper.reference import LogProbCache
from dpo_wrapper.reference.sharding import is_sharded_tensor
from dpo_wrapper.reference.shared_weights import compute_checksums, local_tensor
from dpo_wrapper.training.sharded_state import (
    empty_like_entry,
    map_values,
    read_shards,
    take_sharded,
    write_shards,
)
from dpo_wrapper.training.sharding import shard_like
from dpo_wrapper.training.state_files import ShardedEntry, read_state, write_state
from dpo_wrapper.training.stopping import TrainingError

STATE_FILE = "state.safetensors"
SHARDS_FOLDER = "shards"


class FrozenWeights:
    """The weights of a module that do not train, as they are now.

    A reference may change all the same (TR-DPO): what is no longer as it was goes into checkpoints.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        undo_rescaling(module)
        self.checksums = self.compute()

    def compute(self) -> dict[str, int]:
        """A checksum of each weight that does not train; 0 where its bits cannot be read.

        A weight that is shared stands under all its names. Of sharded weights all processes compute this, and
        the checksums are those of whole ones.
        """
        parameters = self.module.named_parameters(remove_duplicate=False)
        frozen = {name: p for name, p in parameters if not p.requires_grad}
        unique = {id(p): p for p in frozen.values()}
        local = {key: tensor for key, p in unique.items() if (tensor := local_tensor(p)) is not None}
        sums = dict(zip(local, compute_checksums([*map(as_integers, local.values())]), strict=True))
        sums |= sum_over_shards(
            {key: (p, sums.get(key, 0)) for key, p in unique.items() if is_sharded_tensor(p)}
        )
        return {name: sums.get(id(p), 0) for name, p in frozen.items()}

    def find_unchanged(self) -> dict[str, int]:
        """The checksums of the weights that are still as they were."""
        return {name: value for name, value in self.compute().items() if self.checksums[name] == value}

    def check(self, checksums: dict[str, int]) -> None:
        """Raise TrainingError if weights are not those with these checksums."""
        for name, value in checksums.items():
            if self.checksums.get(name) != value:
                raise TrainingError(
                    f"{name} should be as it was when the run began, since no checkpoint holds it, but it "
                    "has changed: put the model back that the run began with, or begin a new run."
                )


def as_integers(tensor: Tensor) -> Tensor:
    """The bits of a tensor such that those of its rows add up to a checksum, however rows are sharded."""
    if tensor[:1].nbytes % 8 == 0 or not tensor.numel():
        return tensor
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.contiguous().view(-1).view(integers).long()


def sum_over_shards(sums: dict[int, tuple[Any, int]]) -> dict[int, int]:
    """By the same keys the checksums of whole tensors, from sharded ones with the checksum of each part."""
    if not sums:
        return {}
    from torch.distributed.tensor import DTensor, Partial

    first = next(iter(sums.values()))[0]
    placements = [Partial() if placement.is_shard() else placement for placement in first.placements]
    local = torch.tensor([value for _, value in sums.values()], device=first.device)
    whole = DTensor.from_local(local, first.device_mesh, placements).full_tensor()
    return dict(zip(sums, whole.tolist(), strict=True))


def write_checkpoint(
    folder: Path,
    accelerator: Accelerator,
    frozen: FrozenWeights,
    optimizer: Any,
    cache: LogProbCache | None,
) -> None:
    """Write this process's part: its random states, its shards and, of the main process, everything else."""
    module = frozen.module
    write_state(random_file(folder, accelerator), get_random_state(accelerator.device))
    if cache is not None and not (accelerator.is_main_process or cache.is_shared):
        write_state(cache_file(folder, accelerator.process_index), dict(cache.state_dict()))
    if not (accelerator.is_main_process or is_sharded(module)):
        return
    undo_rescaling(module)
    unchanged = frozen.find_unchanged()
    state = {
        "module": {n: value for n, value in module.state_dict().items() if not is_part(n, unchanged)},
        "frozen": unchanged,
        "optimizer": optimizer.state_dict(),
        "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
        "reference_cache": None if cache is None else dict(cache.state_dict()),
    }
    check_states(optimizer)
    state, sharded = take_sharded(state)
    if sharded:
        write_shards(folder / SHARDS_FOLDER, sharded)
    if accelerator.is_main_process:
        write_state(folder / STATE_FILE, state)


def check_states(optimizer: Any) -> None:
    """Raise TrainingError if the optimizer keeps values of a sharded weight that are of one process alone."""
    for p, values in optimizer.state.items():
        for name, value in values.items():
            is_local = isinstance(value, Tensor) and value.numel() > 1 and not is_sharded_tensor(value)
            if is_sharded_tensor(p) and is_local:
                raise TrainingError(
                    f"--optimizer should shard its states as the weights are, but {name} is a tensor of one "
                    "process: take one of torch.optim, or train without --fsdp."
                )


def load_checkpoint(
    folder: Path,
    accelerator: Accelerator,
    frozen: FrozenWeights,
    optimizer: Any,
    cache: LogProbCache | None,
) -> None:
    """Put everything back to where the checkpoint was written, and say which random state cannot be.

    It may have been written by any number of processes, with sharded weights or whole ones.

    Raises:
        TrainingError: the checkpoint cannot be read, or the frozen weights are others.
    """
    module = frozen.module
    state = read_state(folder / STATE_FILE)
    frozen.check(state["frozen"])
    undo_rescaling(module)
    state = read_sharded(folder / SHARDS_FOLDER, state, list_targets(module, optimizer))
    load_weights(module, state["module"], set(state["frozen"]))
    optimizer.load_state_dict(state["optimizer"])
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    if cache is not None and state["reference_cache"] is not None:
        load_cache(folder, accelerator, cache, state["reference_cache"])
    problem: str | None = "the checkpoint has none"
    if (file := random_file(folder, accelerator)).is_file():
        problem = set_random_state(read_state(file), accelerator.device)
    if problem:
        process = f"process {accelerator.process_index}"
        print(f"The random state of {process} is not that of the interrupted run: {problem}.")


def load_cache(
    folder: Path, accelerator: Accelerator, cache: LogProbCache, of_main: dict[str, Tensor]
) -> None:
    """Give a process the log-probs that it knew, or all of them where there are more processes or fewer."""
    num_written = len(list(folder.glob("random-*.safetensors")))
    known = {k: file for k in range(1, num_written) if (file := cache_file(folder, k)).is_file()}
    is_same = num_written == accelerator.num_processes and bool(known)
    index = accelerator.process_index
    if index == 0 or not is_same:
        cache.load_state_dict(of_main)
    for k, file in known.items():
        if k == index or not is_same:
            cache.load_state_dict(read_state(file))
    cache.is_shared = not is_same


def list_targets(module: nn.Module, optimizer: Any) -> dict[tuple[Any, ...], Any]:
    """By place in a checkpoint's state, a tensor that what stands there, or below, is sharded as."""
    targets: dict[tuple[Any, ...], Any] = {("module", n): value for n, value in module.state_dict().items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return targets | {("optimizer", "state", k): p for k, p in enumerate(parameters)}


def read_sharded(folder: Path, state: Any, targets: dict[tuple[Any, ...], Any]) -> Any:
    """The state with a tensor in place of each sharded entry; tensors are sharded as their targets are."""
    tensors: dict[str, Tensor] = {}

    def find_target(place: tuple[Any, ...]) -> Any:
        return targets.get(place[:2], targets.get(place[:3]))

    def note(value: Any, place: tuple[Any, ...]) -> Any:
        if isinstance(value, ShardedEntry) and value.name not in tensors:
            tensors[value.name] = empty_like_entry(value, find_target(place))
        return value

    def fill(value: Any, place: tuple[Any, ...]) -> Any:
        if isinstance(value, ShardedEntry):
            return tensors[value.name]
        target = find_target(place)
        has_its_shape = isinstance(value, Tensor) and target is not None and value.shape == target.shape
        return shard_like(value, target) if has_its_shape else value

    map_values(state, note)
    if tensors:
        read_shards(folder, tensors)
    return map_values(state, fill)


def is_part(name: str, parameters: Collection[str]) -> bool:
    """Whether an entry of a state is one of these parameters, or what quantization keeps beside one."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in parameters for end in range(1, len(parts) + 1))


def load_weights(module: nn.Module, weights: dict[str, Any], left_out: Collection[str]) -> None:
    """Load all weights of a module but those that were left out on purpose."""
    targets = module.state_dict()
    sharded = {name: shard_like(value, targets.get(name)) for name, value in weights.items()}
    result = module.load_state_dict(sharded, strict=False)
    missing = [name for name in result.missing_keys if not is_part(name, left_out)]
    if missing or result.unexpected_keys:
        name = (missing + result.unexpected_keys)[0]
        raise TrainingError(
            f"a checkpoint should hold the weights that this run trains, but it differs in {name}: resume "
            "with the model and the versions of libraries that the run began with."
        )


def describe_checkpoint(folder: Path, save_steps: int) -> str:
    """The size of a checkpoint, in words."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    interval = f" every {save_steps} steps" if save_steps else ""
    return f"checkpoint: {size:.{0 if size >= 10 else 1}f} MB{interval} in {folder}"


def random_file(folder: Path, accelerator: Accelerator) -> Path:
    return folder / f"random-{accelerator.process_index}.safetensors"


def cache_file(folder: Path, index: int) -> Path:
    """What a process other than the main one knows of the reference, until all know the same."""
    return folder / f"cache-{index}.safetensors"


def get_random_state(device: torch.device) -> dict[str, Any]:
    """The states of Python's, numpy's and torch's generators, and of that of `device`."""
    numpy_state: Any = np.random.get_state()
    name, key, position, has_gauss, gauss = numpy_state
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(key.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> str | None:
    """Put the generators in these states; returns why that of the device cannot be, or None."""
    random.setstate(state["python"])
    name, key, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cpu":
        return None
    if device.type not in state:
        return f"the checkpoint was not written on {device.type}"
    torch.get_device_module(device).set_rng_state(state[device.type])
    return None
