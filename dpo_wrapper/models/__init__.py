"""Language models of every family behind one interface: logits, hidden states, output head, prefix trees.

A model's family is told by the attributes that it has: no library of models is imported.
"""

import sys
import warnings
from typing import Any

from torch import nn

from dpo_wrapper.models.base import LanguageModel, OutputHead
from dpo_wrapper.models.hugging_face import HuggingFaceModel
from dpo_wrapper.models.x_transformers import XTransformersModel

__all__ = ["LanguageModel", "OutputHead", "language_model"]

OF_HUGGING_FACE = ("config", "base_model", "get_input_embeddings", "get_output_embeddings")
"""Attributes that every model of transformers has."""


def language_model(model: nn.Module) -> LanguageModel:
    """Wrap a model in the class of its family. PEFT or `torch.compile` may have wrapped it before."""
    unadapted: Any = model
    if hasattr(unadapted, "peft_config") and hasattr(unadapted, "get_base_model"):
        unadapted = unadapted.get_base_model()
    inner = getattr(unadapted, "_orig_mod", unadapted)  # what torch.compile has wrapped
    if (library := sys.modules.get("x_transformers.x_transformers")) is not None:
        net = inner
        while is_from_x_transformers(net) and not isinstance(net, library.TransformerWrapper):
            net = getattr(net, "net", None)
        if isinstance(net, library.TransformerWrapper):
            return XTransformersModel(model, unadapted if net is inner else net)
    if all(hasattr(inner, name) for name in OF_HUGGING_FACE):
        return HuggingFaceModel(model, inner)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        warnings.warn(
            f"all logits of a model inside {type(model).__name__} are computed: make DPO of the model itself "
            "and wrap DPO in DistributedDataParallel.",
            stacklevel=2,
        )
    return LanguageModel(model)


def is_from_x_transformers(module: object) -> bool:
    """Whether a class of the library, or a subclass of one, made it."""
    return any(base.__module__.startswith("x_transformers.") for base in type(module).__mro__)
