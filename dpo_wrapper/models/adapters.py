"""Adapters beside a model's weights: PEFT's, and others (loralib) that mark layers in the same way."""

import re

from torch import nn

from dpo_wrapper.models.list_modules import list_modules

LORA_FACTOR = re.compile(r"lora_(embedding_)?[AB]\.")
"""In the names of a LoRA adapter's parameters."""


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is an adapted layer, which can write its adapter into the weights that it adapts."""
    return "merged_adapters" in vars(module) or isinstance(vars(module).get("merged"), bool)


def is_merged(model: nn.Module) -> bool:
    """Whether an adapter of the model is merged into the weights that it adapts, so that it cannot train."""
    return any(vars(m).get("merged_adapters") or vars(m).get("merged") is True for m in list_modules(model))


def mergeable_parameters(model: nn.Module) -> set[int]:
    """The `id()` of each parameter in an adapted layer: merging writes some of them, even by `.data`."""
    return {id(p) for module in model.modules() if is_adapted(module) for p in module.parameters()}
