"""A Hugging Face folder without adapter."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_wrapper.commands.export.agreement import TOLERANCES
from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.commands.export.exported import Check, Exported
from dpo_wrapper.commands.export.mlx_reader import list_commands, make_mlx_check
from dpo_wrapper.commands.export.rope_keys import repeat_rope_keys
from dpo_wrapper.commands.export.source import ExportSource
from dpo_wrapper.commands.export.transformers_reader import ModuleReader
from dpo_wrapper.commands.export.weights import WeightDigests
from dpo_wrapper.libraries.tensor_files import apply_umask
from dpo_wrapper.pretrained.model import CONFIG_FILE


def write_merged(source: ExportSource, folder: Path, config: ExportConfig) -> Exported:
    """Write the model, its adapter merged in float32, with its tokenizer.

    Raises:
        ValueError: the dtype cannot hold its weights.
    """
    model: Any = source.merge().pretrained.model
    dtype = getattr(torch, config.dtype)
    weights = WeightDigests.of(model, dtype)
    model.save_pretrained(folder, state_dict=cast_state(model, dtype))
    source.tokenizer.save(folder)
    write_dtype(folder / CONFIG_FILE, config.dtype)
    repeat_rope_keys(folder / CONFIG_FILE)
    for file in folder.glob("*.safetensors"):
        apply_umask(file)
    tolerance = TOLERANCES[config.dtype]
    checks = [
        Check(lambda: ModuleReader("transformers", lambda: load_in_float32(folder), weights), tolerance),
        make_mlx_check(source, folder, tolerance),
    ]
    usage = [
        f'AutoModelForCausalLM.from_pretrained("{folder}")',
        *list_commands(source, config, folder),
    ]
    return Exported(folder, checks, usage, [weights.note])


def load_in_float32(folder: str | Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def cast_state(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state of a model in another dtype; what is tied stays so.

    Raises:
        ValueError: a weight is too large for it.
    """
    cast: dict[int, Tensor] = {}
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.data_ptr() in cast:
            state[name] = cast[tensor.data_ptr()]
        elif tensor.is_floating_point():
            state[name] = cast[tensor.data_ptr()] = tensor.to(dtype)
            if not state[name].isfinite().all() and tensor.isfinite().all():
                raise ValueError(
                    f"--dtype should hold the model's weights, but {name} has one of "
                    f"{tensor.abs().max():.1e}, which is too large for {str(dtype).removeprefix('torch.')}: "
                    "use bfloat16."
                )
    return state


def write_dtype(file: Path, dtype: str) -> None:
    """Name the dtype of the weights in a config.json, for older versions of transformers too."""
    settings = json.loads(file.read_text(encoding="utf-8")) | {"dtype": dtype, "torch_dtype": dtype}
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
