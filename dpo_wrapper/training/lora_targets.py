"""Which layers of a model a new LoRA adapter adapts."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from dpo_wrapper.models import language_model
from dpo_wrapper.training.options.lora import parse_layers

MODELS_WITH_KERNELS = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
"""Types of transformers' models whose kernels read the weight of `out_proj` without calling the layer."""

IN_A_BLOCK = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")
"""The name of a module in a block, whose number is the first in it, as PEFT counts them."""


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that LoRA can adapt, by name."""
    kinds = (nn.Linear, nn.Embedding)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) or type(module).__name__ == "Conv1D"
    }


def choose_targets(
    model: nn.Module,
    candidates: Mapping[str, nn.Module],
    targets: tuple[str, ...] | None = None,
    layers: Sequence[int] | None = None,
) -> list[str] | str:
    """The target modules as PEFT takes them; ValueError if a target matches no layer of the blocks.

    Args:
        candidates: the layers that LoRA can adapt, by name.
        targets, layers: those of --lora-targets, and the numbers of --lora-layers.
    """
    if targets is None:
        return shorten_names(find_block_layers(model, candidates), model)
    is_expression = len(targets) == 1 and re.search(r"[\\*+?|()\[\]^$]", targets[0]) is not None
    if is_expression and layers is not None:
        raise ValueError(
            f"--lora-layers should be given with names of layers, but --lora-targets is the expression "
            f"{targets[0]}: write the numbers into it."
        )
    for target in targets:
        if is_expression:
            matched = [name for name in candidates if re.fullmatch(target, name)]
        else:
            matched = [name for name in candidates if f".{name}".endswith(f".{target}")]
        if not matched:
            example = next((name for name in candidates if IN_A_BLOCK.match(name)), "")
            hint = f" of the whole names, such as {example}" if is_expression else ""
            raise ValueError(
                f"--lora-targets should name layers of the model, but {target} matches none{hint}: it has "
                f"{', '.join(name_kinds(candidates))}."
            )
        if layers is not None and not any(find_block(name) in layers for name in matched):
            raise ValueError(
                f"--lora-targets should name layers in the blocks of --lora-layers, but {target} is in none "
                "of them: leave one of the two out."
            )
        check_tied_weights(model, candidates, matched)
    return targets[0] if is_expression else list(targets)


def find_block_layers(model: Any, candidates: Mapping[str, nn.Module]) -> list[str]:
    """The names of the linear layers in the blocks of the part of a model that reads text."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    inside = {id(module) for module in (decoder or model).modules()}
    has_kernels = getattr(getattr(model, "config", None), "model_type", None) in MODELS_WITH_KERNELS
    names = [
        name
        for name, module in candidates.items()
        if id(module) in inside and IN_A_BLOCK.match(name) and not isinstance(module, nn.Embedding)
        if not (has_kernels and name.endswith("out_proj"))
    ]
    if not names:
        raise ValueError(
            f"--lora should find linear layers in numbered blocks, but {type(model).__name__} has none: name "
            f"layers by --lora-targets; it has {', '.join(name_kinds(candidates)) or 'none'}."
        )
    return names


def shorten_names(names: Iterable[str], model: nn.Module) -> list[str]:
    """The shortest ends of the names, in dotted parts, that no other module of the model ends with."""
    chosen = set(names)
    others = [f".{name}" for name, _ in model.named_modules() if name not in chosen]
    ends = set()
    for name in chosen:
        parts = name.split(".")
        possible = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
        ends.add(next(end for end in possible if not any(o.endswith(f".{end}") for o in others)))
    return sorted(ends)


def check_tied_weights(model: nn.Module, candidates: Mapping[str, nn.Module], names: Iterable[str]) -> None:
    """Raise ValueError if a layer has the weight of another one as well."""
    weights = [id(module.weight) for module in candidates.values()]
    head = language_model(model).output_head()
    for name in names:
        weight = candidates[name].weight
        is_also_head = (
            isinstance(candidates[name], nn.Embedding) and head is not None and head.weight is weight
        )
        if is_also_head or weights.count(id(weight)) > 1:
            raise ValueError(
                f"--lora-targets should name layers with weights of their own, but {name} shares its weight "
                "(tied embeddings), which an adapter would part: leave it out."
            )


def name_kinds(candidates: Iterable[str]) -> list[str]:
    """The names of layers without the numbers of their blocks."""
    kinds = [re.sub(r"^.*?\.\d+\.", "", name) if IN_A_BLOCK.match(name) else name for name in candidates]
    return list(dict.fromkeys(kinds))


def find_block(name: str) -> int | None:
    """The number of the block that a module is in, by its name; None if it is in none."""
    match = IN_A_BLOCK.match(name)
    return None if match is None else int(match["index"])


def choose_layers(candidates: Iterable[str], text: str | None) -> list[int] | None:
    """The numbers of the blocks to adapt, None for all; ValueError if the model lacks one of them."""
    layers = None if text is None else parse_layers(text)
    if layers is None:
        return None
    present = sorted({number for name in candidates if (number := find_block(name)) is not None})
    if missing := [number for number in layers if number not in present]:
        last = f"has blocks {present[0]} to {present[-1]}" if present else "has no numbered blocks"
        raise ValueError(
            f"--lora-layers should be numbers of the model's blocks, but {missing[0]} is none of them: the "
            f"model {last}."
        )
    return layers
