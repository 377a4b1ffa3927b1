"""The files of a checkpoint: module, optimizer and random states."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from dpo_wrapper.pretrained import undo_rescaling
from dpo_wrapper.reference import LogProbCache
from dpo_wrapper.training.state_files import read_state, write_state

STATE_FILE = "state.safetensors"


def write_checkpoint(
    folder: Path, accelerator: Accelerator, module: nn.Module, optimizer: Any, cache: LogProbCache | None
) -> None:
    """Write this process's part: its random states and, of the main process, everything else."""
    write_state(random_file(folder, accelerator), get_random_state(accelerator.device))
    if accelerator.is_main_process:
        undo_rescaling(module)
        state = {
            "module": dict(module.state_dict()),
            "optimizer": optimizer.state_dict(),
            "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            "reference_cache": None if cache is None else dict(cache.state_dict()),
        }
        write_state(folder / STATE_FILE, state)


def load_checkpoint(
    folder: Path, accelerator: Accelerator, module: nn.Module, optimizer: Any, cache: LogProbCache | None
) -> None:
    """Put everything back to where the checkpoint was written, and say which random state cannot be."""
    state = read_state(folder / STATE_FILE)
    undo_rescaling(module)
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    if cache is not None and state["reference_cache"] is not None:
        cache.load_state_dict(state["reference_cache"])
    problem: str | None = "the checkpoint has none"
    if (file := random_file(folder, accelerator)).is_file():
        problem = set_random_state(read_state(file), accelerator.device)
    if problem:
        process = f"process {accelerator.process_index}"
        print(f"The random state of {process} is not that of the interrupted run: {problem}.")


def random_file(folder: Path, accelerator: Accelerator) -> Path:
    return folder / f"random-{accelerator.process_index}.safetensors"


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
