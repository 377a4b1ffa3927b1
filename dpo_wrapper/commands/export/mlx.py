"""The adapter as mlx-lm reads it: `adapters.safetensors` and a configuration of its own."""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_wrapper.commands.export.agreement import TOLERANCES, ExportError
from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.commands.export.exported import Check, Exported
from dpo_wrapper.commands.export.lora_factors import LoraFactors, list_lora_factors
from dpo_wrapper.commands.export.mlx_base import find_folder, find_misreading, link_base
from dpo_wrapper.commands.export.mlx_reader import find_mlx_gap, list_commands, make_mlx_check
from dpo_wrapper.commands.export.source import ExportSource
from dpo_wrapper.commands.export.transformers_reader import ModuleReader
from dpo_wrapper.libraries.tensor_files import apply_umask
from dpo_wrapper.pretrained import load_pretrained
from dpo_wrapper.pretrained.adapter import ADAPTER_CONFIG, read_adapter_config
from dpo_wrapper.pretrained.mlx_adapter import LAYER, MLX_WEIGHTS, load_mlx_adapter

NAME = re.compile(r"(self_attn|mlp)\.\w+")
EMBEDDINGS, HEAD = "model.embed_tokens", "lm_head"
"""Names of modules that are the same in transformers and mlx-lm."""

BASE_FOLDER = "base"
"""Inside of the export: the base with a config.json that mlx-lm reads right."""


def write_mlx(source: ExportSource, folder: Path, config: ExportConfig) -> Exported:
    """Write the adapter for mlx-lm, with the tokenizer, and its base anew where mlx-lm would misread that."""
    origin = source.require_adapter("mlx")
    factors = list_lora_factors(source.pretrained.model, "mlx")
    base = find_folder(origin.base)
    write_mlx_adapter(factors, folder, origin.base, count_layers(source.pretrained.model))
    source.tokenizer.save(folder)
    name, notes = origin.base, []
    if (reason := find_misreading(source, base)) is not None:
        base = link_base(source, base, folder / BASE_FOLDER)
        name = str(base)
        notes.append(
            f"mlx-lm would misread {origin.base}, {reason}: {base} is the same, with links to its weights "
            "(cp -rL copies it with them)."
        )

    notes.append(f"all {len(factors)} pairs of factors are those of the adapter")
    tolerance = TOLERANCES["float32"]
    checks = [
        Check(
            lambda: ModuleReader("PEFT, from mlx-lm's file", lambda: read_back(folder, origin.base, factors)),
            tolerance,
        ),
        make_mlx_check(source, base, tolerance, folder),
    ]
    usage = list_commands(source, config, base, name=name, adapter=folder)
    return Exported(folder, checks, usage, notes)


def read_back(folder: Path, base: str, factors: Sequence[LoraFactors]) -> nn.Module:
    """PEFT's model with the adapter as it was written; ExportError if it holds other factors."""
    model = load_pretrained(base, None, max_length=1).model
    try:
        model = load_mlx_adapter(folder, read_adapter_config(folder), model)
    except ValueError as error:
        raise ExportError(str(error)) from error
    found = {one.path: one for one in list_lora_factors(model, "mlx")}
    wrong = [one.path for one in factors if one.path not in found or not is_same(one, found[one.path])]
    if wrong or len(found) > len(factors):
        raise ExportError(
            f"the export should hold the {len(factors)} pairs of factors of the adapter, but "
            f"{len(wrong)} of its {len(found)} are others ({', '.join(wrong[:1])}): do not use it."
        )
    return model


def is_same(factors: LoraFactors, other: LoraFactors) -> bool:
    """Whether two adapters of a module are one, but for zeros and for the scale, which may be in B."""
    a, b = pad_to_rank(factors, other.rank)
    scaled, other_scaled = factors.scale * b, other.scale * other.b
    return torch.equal(a, other.a) and torch.allclose(scaled, other_scaled, rtol=1e-6, atol=0)


def check_mlx_takes(factors: Sequence[LoraFactors], settings: Any, base: Path) -> None:
    """Raise ValueError for a base that mlx-lm does not know, and for factors of what is no module there."""
    if (reason := find_mlx_gap(base)) is not None:
        raise ValueError(
            f"--to mlx needs a base that mlx-lm can compute, but {base} is none: {reason}; use --to peft."
        )
    for one in factors:
        match = LAYER.fullmatch(one.path)
        is_in_layer = match is not None and NAME.fullmatch(match[2]) is not None
        if not is_in_layer and one.path not in (EMBEDDINGS, HEAD):
            raise ValueError(
                "--to mlx takes adapted modules that mlx-lm names as transformers does (model.layers.N.*.*, "
                f"{EMBEDDINGS}, {HEAD}), but one is {one.path}: use --to merged."
            )
        if settings.tie_word_embeddings and one.path in (EMBEDDINGS, HEAD):
            raise ValueError(
                "--to mlx takes an adapter of embeddings or head where the two are apart, but they are one "
                f"weight in this model, so that mlx-lm would change both ({one.path}): use --to merged."
            )


def count_layers(model: Any) -> int:
    return int(model.config.get_text_config().num_hidden_layers)


def write_mlx_adapter(factors: Sequence[LoraFactors], folder: Path, base: str, num_layers: int) -> None:
    """Write factors with one rank and one scale: smaller ranks get zeros, and B takes in other scales."""
    from safetensors.torch import save_file

    rank = max(one.rank for one in factors)
    scales = {one.scale for one in factors}
    scale = scales.pop() if len(scales) == 1 else 1.0
    tensors = {}
    for one in factors:
        a, b = pad_to_rank(one, rank)
        tensors[f"{one.path}.lora_a"] = a.T.contiguous()
        tensors[f"{one.path}.lora_b"] = (b * (one.scale / scale)).T.contiguous()
    save_file(tensors, str(folder / MLX_WEIGHTS), metadata={"format": "mlx"})
    apply_umask(folder / MLX_WEIGHTS)
    settings = {
        "fine_tune_type": "lora",
        "model": base,
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": 0.0,
            "keys": name_keys([one.path for one in factors], num_layers),
        },
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def pad_to_rank(factors: LoraFactors, rank: int) -> tuple[Tensor, Tensor]:
    """A and B with zeros for what they lack to a rank."""
    lacking = rank - factors.rank
    return F.pad(factors.a, (0, 0, 0, lacking)), F.pad(factors.b, (0, lacking))


def name_keys(paths: Sequence[str], num_layers: int) -> list[str]:
    """Modules as mlx-lm names them: by their name within a layer where all layers have it, else in full."""
    layers_of = defaultdict(list)
    keys = []
    for path in paths:
        if (match := LAYER.fullmatch(path)) is not None:
            layers_of[match[2]].append(path)
        else:
            keys.append(path)
    for name, found in layers_of.items():
        keys += [name] if len(found) == num_layers else found
    return keys
