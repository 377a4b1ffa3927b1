"""Exports as transformers, PEFT and x-transformers read them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from dpo_wrapper.commands.export.agreement import Logits
from dpo_wrapper.commands.export.weights import WeightDigests


class ModuleReader:
    """A model in torch, loaded in float32.

    Args:
        name: the program that has loaded it.
        load: gives the model.
        weights: what it should hold; None where it is compared by its logits alone.
        tokenize: text -> ids by the export's own tokenizer; None where it has none.

    Raises:
        ExportError: it holds other weights.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], nn.Module],
        weights: WeightDigests | None = None,
        tokenize: Callable[[str], list[int]] | None = None,
    ) -> None:
        self.name, self._tokenize = name, tokenize
        self.model: Any = load().eval()
        if weights is not None:
            weights.check(self.model)

    @torch.no_grad()
    def compute_logits(self, ids: Sequence[int]) -> Logits:
        output = self.model(torch.tensor([list(ids)]))
        return np.asarray(getattr(output, "logits", output)[0].float())

    def tokenize(self, text: str) -> list[int] | None:
        return None if self._tokenize is None else self._tokenize(text)

    def close(self) -> None:
        self.model = None
