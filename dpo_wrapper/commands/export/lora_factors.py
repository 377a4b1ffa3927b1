"""The factors of a LoRA adapter, as other programs than PEFT take them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of an adapter, by PEFT's names, that are taken out of the base's weights. An adapter that was
converted for the base as it was names none of them."""


@dataclass(frozen=True)
class LoraFactors:
    """The change `scale * b @ a` of one weight, or `scale * (b @ a).T` of an embedding.

    Attributes:
        path: of the module in the base, such as `model.layers.0.self_attn.q_proj`.
        a: Float[r, in], for an embedding [r, tokens].
        b: Float[out, r], for an embedding [width, r].
        scale: alpha / r, or alpha / √r where it is rank-stabilized.
        is_embedding: whether the weight is a table of embeddings.
    """

    path: str
    a: Tensor
    b: Tensor
    scale: float
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        return len(self.a)


def list_lora_factors(model: nn.Module, form: str) -> list[LoraFactors]:
    """The factors of PEFT's model with a LoRA adapter, in float32.

    Args:
        model: PEFT's.
        form: what they are for, as `--to` names it.

    Raises:
        ValueError: the adapter holds more than factors of linear layers and embeddings.
    """
    peft_model: Any = model
    config = peft_model.peft_config[peft_model.active_adapter]
    if (reason := find_other_parts(config)) is not None:
        raise ValueError(
            f"--to {form} takes factors of linear layers and embeddings alone, but the adapter {reason}: use "
            "--to merged."
        )
    factors = []
    base = peft_model.get_base_model()
    for path, layer in base.named_modules():
        name = peft_model.active_adapter
        if (variant := getattr(layer, "lora_variant", {}).get(name)) is not None:
            raise ValueError(
                f"--to {form} takes layers that add scale · B A x to what the base computes, but {path} "
                f"computes otherwise ({type(variant).__name__}): use --to merged or peft."
            )
        if name in getattr(layer, "lora_A", ()):
            a, b = detach(layer.lora_A[name].weight), detach(layer.lora_B[name].weight)
            if not isinstance(layer.get_base_layer(), nn.Linear):
                kind = type(layer.get_base_layer()).__name__
                raise ValueError(
                    f"--to {form} takes factors of nn.Linear and nn.Embedding, but {path} is a {kind}: use "
                    "--to merged."
                )
            factors.append(LoraFactors(path, a, b, float(layer.scaling[name])))
        elif name in getattr(layer, "lora_embedding_A", ()):
            a, b = detach(layer.lora_embedding_A[name]), detach(layer.lora_embedding_B[name])
            factors.append(LoraFactors(path, a, b, float(layer.scaling[name]), is_embedding=True))
    return factors


def detach(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def find_other_parts(config: Any) -> str | None:
    """What an adapter has beside plain factors, as a part of a sentence; None if nothing."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        return f"is of the kind {kind}"
    if config.use_dora:
        return "has magnitudes beside them (DoRA)"
    if config.bias != "none":
        return f"trains biases ({config.bias})"
    if config.modules_to_save:
        return f"holds whole layers ({', '.join(config.modules_to_save)})"
    if getattr(config, "trainable_token_indices", None):
        return "holds embeddings of single tokens"
    if getattr(config, "lora_bias", False):
        return "has biases of its own (lora_bias)"
    if str(config.init_lora_weights).startswith(CHANGE_THE_BASE):
        return f"stands on what its beginning has left of the base ({config.init_lora_weights})"
    if getattr(config, "layer_replication", None):
        return "repeats layers of the base (layer_replication)"
    if getattr(config, "target_parameters", None):
        return "changes parameters of experts"
    return None
