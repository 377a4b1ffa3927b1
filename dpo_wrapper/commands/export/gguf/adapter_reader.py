"""A LoRA adapter in a GGUF file, mapped back onto a model in torch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_wrapper.commands.export.agreement import ExportError, Logits
from dpo_wrapper.commands.export.lora_factors import LoraFactors
from dpo_wrapper.pretrained.gguf_adapter import GgufAdapter, read_gguf_adapter
from dpo_wrapper.pretrained.gguf_names import EMBEDDING

ROUNDING = 1e-5
"""The largest difference of a change from the adapter's, relative to it, that float32 explains."""


class AdapterFileReader:
    """The file's factors on the model that the adapter stands on, computed as llama.cpp does.

    Args:
        file: of the adapter.
        base: transformers' model, to which nothing else is done.
        factors: of PEFT's adapter, which those of the file should be.

    Raises:
        ExportError: they are others.
    """

    name = "the file's own reader"

    def __init__(self, file: Path, base: nn.Module, factors: Sequence[LoraFactors]) -> None:
        self._base: Any = base
        try:
            adapter = read_gguf_adapter(file, self._base.config)
            check_changes(adapter, factors)
        except ValueError as error:
            raise ExportError(str(error)) from error
        for path, (a, b) in adapter.factors.items():
            base.get_submodule(path).register_forward_hook(make_hook(a, b, adapter.scale(path), path))

    @torch.no_grad()
    def compute_logits(self, ids: Sequence[int]) -> Logits:
        return np.asarray(self._base(torch.tensor([list(ids)])).logits[0])

    def tokenize(self, text: str) -> list[int] | None:
        return None

    def close(self) -> None:
        self._base = None


def make_hook(a: Tensor, b: Tensor, scale: float, path: str) -> Callable[[Any, Any, Tensor], Tensor]:
    """Adds the change to what a module computes."""

    def add_change(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        low = F.embedding(inputs[0], a.T) if path == EMBEDDING else F.linear(inputs[0], a)
        return output + scale * F.linear(low, b)

    return add_change


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
            adapter.scale(one.path) * b @ (a @ probe) if shapes_agree else torch.full_like(expected, np.inf)
        )
        if not (found - expected).abs().max() <= ROUNDING * expected.abs().max():
            raise ValueError(
                f"the file should change {one.path} as the adapter does, but it changes it otherwise: do not "
                "use it."
            )
