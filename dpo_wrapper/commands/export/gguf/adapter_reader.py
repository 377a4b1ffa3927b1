"""A LoRA adapter in a GGUF file, read back and compared with PEFT's."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dpo_wrapper.commands.export.agreement import ExportError
from dpo_wrapper.commands.export.lora_factors import LoraFactors
from dpo_wrapper.pretrained.gguf_adapter import (
    GGUF_ADAPTER,
    GgufAdapter,
    load_gguf_adapter,
    read_gguf_adapter,
)

ROUNDING = 1e-5
"""The largest difference of a change from the adapter's, relative to it, that float32 explains."""


def load_checked(folder: Path, base: nn.Module, factors: Sequence[LoraFactors]) -> nn.Module:
    """PEFT's model of a base with the adapter in a folder, whose factors are those of another.

    Raises:
        ExportError: they are others.
    """
    try:
        check_changes(read_gguf_adapter(folder / GGUF_ADAPTER, base.config), factors)
        return load_gguf_adapter(folder, base)
    except ValueError as error:
        raise ExportError(str(error)) from error


def check_changes(adapter: GgufAdapter, factors: Sequence[LoraFactors]) -> None:
    """Raise ValueError unless a file changes the weights that the adapter does, and each as it does.

    Logits would not show a lost factor where it changes little.
    """
    if others := adapter.types - {"F32"}:
        raise ValueError(
            f"the adapter's tensors should be F32, but some are {', '.join(sorted(others))}: with those "
            "llama.cpp rounds what it multiplies as well."
        )
    paths = {one.path for one in factors}
    if different := sorted(paths ^ set(adapter.factors)):
        raise ValueError(
            f"the file should change the {len(paths)} weights that the adapter does, but it changes "
            f"{len(adapter.factors)} ({different[0]} is in one alone): do not use it."
        )
    generator = torch.Generator().manual_seed(0)
    for one in factors:
        a, b = adapter.factors[one.path]
        probe = torch.randn(one.a.shape[1], 4, generator=generator)
        expected = one.scale * one.b @ (one.a @ probe)
        shapes_agree = a.shape[1:] == one.a.shape[1:] and b.shape[:1] == one.b.shape[:1]
        found = (
            adapter.scale(one.path) * b @ (a @ probe)
            if shapes_agree
            else torch.full_like(expected, torch.inf)
        )
        if not (found - expected).abs().max() <= ROUNDING * expected.abs().max():
            raise ValueError(
                f"the file should change {one.path} as the adapter does, but it changes it otherwise: do not "
                "use it."
            )
