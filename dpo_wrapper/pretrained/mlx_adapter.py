"""LoRA adapters in mlx-lm's format, as PEFT's on the same base."""

import re
from pathlib import Path
from typing import Any

from torch import nn

MLX_WEIGHTS = "adapters.safetensors"
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
"""The path of a module within a layer, in transformers and in mlx-lm."""


def is_mlx_folder(folder: str | Path) -> bool:
    """Whether an adapter is in mlx-lm's format, whose configuration has the same file name as PEFT's."""
    return (Path(folder) / MLX_WEIGHTS).is_file()


def load_mlx_adapter(folder: str | Path, settings: dict[str, Any], base: nn.Module) -> nn.Module:
    """PEFT's model of a base with the adapter in a folder, which trains.

    mlx-lm computes `x @ W.T + scale * x @ lora_a @ lora_b`: its factors are PEFT's transposed.

    Args:
        folder: holds `adapters.safetensors`.
        settings: its adapter_config.json.
        base: a Hugging Face model.

    Raises:
        ValueError: the adapter is no LoRA, or not one of this base.
    """
    import peft
    from safetensors.torch import load_file

    kind = settings.get("fine_tune_type", "lora")
    if kind != "lora":
        raise ValueError(f"the adapter in {folder} should be LoRA, but it is {kind}: fuse it by mlx_lm.fuse.")
    parameters = settings["lora_parameters"]
    total_layers = base.config.get_text_config().num_hidden_layers  # type: ignore[union-attr,operator]
    modules, state, paths = dict(base.named_modules()), {}, set()
    for name, tensor in load_file(Path(folder) / MLX_WEIGHTS).items():
        path, _, factor = name.rpartition(".")
        if path not in modules or not is_named(path, settings, total_layers):
            raise ValueError(
                f"the adapter in {folder} should hold factors of modules that the base has and its keys "
                f"name, but {name} is of none: export it again."
            )
        letter = factor.removeprefix("lora_").upper()
        is_embedding = isinstance(modules[path], nn.Embedding)
        peft_name = f"lora_embedding_{letter}" if is_embedding else f"lora_{letter}.weight"
        state[f"base_model.model.{path}.{peft_name}"] = tensor.T.contiguous()
        paths.add(path)
    config = peft.LoraConfig(
        r=parameters["rank"],
        lora_alpha=parameters["scale"] * parameters["rank"],
        lora_dropout=parameters.get("dropout", 0.0),
        target_modules=sorted(paths),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config)
    try:
        peft.set_peft_model_state_dict(model, state)
    except RuntimeError as error:
        raise ValueError(
            f"the adapter in {folder} should have factors of the shapes of its base and rank, but they have "
            "others: export it again."
        ) from error
    return model


def is_named(path: str, settings: dict[str, Any], total_layers: int) -> bool:
    """Whether mlx-lm adapts a module: by its path in full, or by its name in the last `num_layers` layers."""
    keys = settings["lora_parameters"].get("keys")
    if keys is None or path in keys:
        return True
    match = LAYER.fullmatch(path)
    num_adapted = settings["num_layers"]
    is_in_last = match is not None and (num_adapted <= 0 or int(match[1]) >= total_layers - num_adapted)
    return match is not None and is_in_last and match[2] in keys
