"""What options of the model do to the policy once it is loaded: dtype, freezing, checkpointing, compiling."""

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from dpo_wrapper.libraries.error_text import summarize_error
from dpo_wrapper.models import language_model
from dpo_wrapper.pretrained import rescales_in_eval_mode
from dpo_wrapper.scoring import Scorer
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.processes import join_processes

COMPILED = re.compile(r"(MLP|FeedForward|FFN|Norm)$", re.IGNORECASE)
"""The names of the classes that are compiled; torch's own layers are fast already."""


def resolve_dtype(config: TrainConfig) -> torch.dtype | None:
    """The dtype to load the model's own weights in; None for the one that they are stored in."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    # on a CPU, float32 is exact, and faster than bfloat16 where the CPU has no units for it
    is_stored = config.has_adapter and join_processes(config).device.type != "cpu"
    return None if is_stored else torch.float32


def set_up_policy(model: nn.Module, config: TrainConfig) -> list[str]:
    """Freeze, checkpoint and compile as the options say; returns notes for the start of the run.

    Raises:
        ValueError: an option that cannot act on this model.
    """
    if getattr(model, "is_quantized", False) and not config.has_adapter:
        raise ValueError(
            f"--model should hold weights that train, but those of {type(model).__name__} are quantised: add "
            "--lora, or name the model as it was before."
        )
    if config.freeze:
        freeze_parameters(model, config.freeze)
    notes = check_trained_dtype(model)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    if config.share_prefix == "always":
        check_sharing(model)
    if config.torch_compile:
        try_compiler(join_processes(config).device)
        notes.append(f"compiled: {compile_layers(model)} feed-forward layers and norms")
    return notes


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> None:
    """Stop the parameters whose names match a pattern from training; ValueError if it should match others."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    train_before = {name for name, p in parameters.items() if p.requires_grad}
    for pattern in patterns:
        names = [name for name in parameters if re.search(pattern, name)]
        if not names:
            raise ValueError(
                f"--freeze should match names of parameters, but {pattern} matches none: "
                f"{suggest_names(pattern, list(parameters))}."
            )
        if train_before.isdisjoint(names):
            raise ValueError(
                f"--freeze should match parameters that would train, but {pattern} matches none of the "
                "adapter, and its base is frozen anyway: leave it out."
            )
        for name in names:
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"--freeze should leave parameters to train, but {' '.join(patterns)} matches all of them: leave "
            "a pattern out."
        )


def suggest_names(pattern: str, names: list[str]) -> str:
    """Parameters whose names, or parts of names, are close to a pattern that matches none."""
    parts = list(dict.fromkeys(part for name in names for part in (*name.split("."), name)))
    close = get_close_matches(pattern, parts, n=3, cutoff=0.5)
    return f"close are {', '.join(close)}" if close else f"names are such as {names[0]} and {names[-1]}"


def check_trained_dtype(model: nn.Module) -> list[str]:
    """A note if weights train in 16 bits; ValueError for float16, in which AdamW divides by zero."""
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if torch.float16 in dtypes:
        raise ValueError(
            "--dtype float16 should be for weights that do not train, for AdamW's squares of gradients are 0 "
            "in it: give --dtype bfloat16, or --precision fp16 with weights in float32."
        )
    if torch.bfloat16 not in dtypes:
        return []
    return [
        "weights train in bfloat16: updates below a few thousandths of a weight are lost to rounding, which "
        "--precision bf16 with weights in float32 avoids"
    ]


def enable_checkpointing(model: Any) -> None:
    """Have the layers of a model of transformers run again in backward."""
    name = type(language_model(model).called_module).__name__
    problem = "--gradient-checkpointing should be given for a model that can compute its layers again"
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise ValueError(
            f"{problem}, but {name} of x-transformers has no such option: lower --micro-batch-tokens instead."
        )
    # its name from transformers 5.24 on, which warns of the other one
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ValueError(f"{problem}, but {name} cannot: leave it out.") from error


def check_sharing(model: nn.Module) -> None:
    """Raise ValueError if prefixes cannot be shared, which on some devices turns out in training alone."""
    scorer = Scorer(model, share_prefix=True, is_eval=not rescales_in_eval_mode(model))
    scorer.find_probe(next(model.parameters()).device)


def try_compiler(device: torch.device) -> None:
    """Raise ValueError if torch finds no compiler for a device; the run would stop at its first step."""
    try:
        torch.compile(lambda x: x.relu() + 1)(torch.ones(2, device=device))
    except RuntimeError as error:  # which all of the compiler's errors are
        reason = summarize_error(error)
        raise ValueError(
            f"--torch-compile needs a compiler that torch can use, but it finds none ({reason}): install "
            "one, such as gcc on a CPU, or leave it out."
        ) from error


def compile_layers(model: nn.Module) -> int:
    """Compile feed-forward layers and norms in place, which changes no names of weights; returns how many.

    Attention is not compiled: a prefix tree would break it up, and torch would compile it for each layer.
    """
    module = language_model(model).called_module
    layers = list(find_compiled_layers(module))
    if not layers:
        raise ValueError(
            "--torch-compile should be given for a model with feed-forward layers or norms of its own, but "
            f"{type(module).__name__} has none: leave it out."
        )
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


def find_compiled_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost layers that are compiled."""
    for child in module.children():
        is_torchs = type(child).__module__.startswith("torch.")
        if COMPILED.search(type(child).__name__) and not is_torchs:
            yield child
        else:
            yield from find_compiled_layers(child)
