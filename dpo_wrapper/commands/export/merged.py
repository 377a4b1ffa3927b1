"""A Hugging Face folder without adapter."""

from pathlib import Path
from typing import Any

import torch

from dpo_wrapper.commands.export.agreement import TOLERANCES
from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.commands.export.exported import Check, Exported
from dpo_wrapper.commands.export.mlx_reader import find_mlx_gap, format_generation, make_mlx_check
from dpo_wrapper.commands.export.rope_keys import complete_config
from dpo_wrapper.commands.export.source import ExportSource
from dpo_wrapper.commands.export.transformers_reader import ModuleReader
from dpo_wrapper.libraries.tensor_files import apply_umask
from dpo_wrapper.pretrained.model import CONFIG_FILE


def write_merged(source: ExportSource, folder: Path, config: ExportConfig) -> Exported:
    """Write the model, its adapter merged in float32, with its tokenizer.

    Raises:
        ValueError: it is a model of x-transformers.
    """
    if source.kind == "x_transformers":
        raise ValueError(
            f"--to merged writes a Hugging Face folder, but {source.name} is a model of x-transformers: use "
            "--to x-transformers."
        )
    model: Any = source.merge().pretrained.model
    dtype = getattr(torch, config.dtype)
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    model.save_pretrained(folder, state_dict=tensors)
    source.tokenizer.save(folder)
    complete_config(folder / CONFIG_FILE, dtype=config.dtype)
    for file in folder.glob("*.safetensors"):
        apply_umask(file)
    tolerance = TOLERANCES[config.dtype]
    checks = [
        Check(lambda: ModuleReader("transformers", lambda: load_in_float32(folder)), tolerance),
        make_mlx_check(folder, tolerance),
    ]
    usage = [f'AutoModelForCausalLM.from_pretrained("{folder}")']
    if find_mlx_gap(folder) is None:
        usage.append(format_generation(source, folder, config))
    return Exported(folder, checks, usage)


def load_in_float32(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
