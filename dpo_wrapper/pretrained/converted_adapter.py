"""LoRA adapters that start from a part of the base's weights, converted for the base as it is, and back.

PiSSA and OLoRA start with factors A₀, B₀ and take s·B₀A₀ out of the weight W. What the policy computes with,
W - s·B₀A₀ + s·BA, is W with a plain adapter of twice the rank, whose factors are [A; A₀] and [B, -B₀].
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


def as_plain_lora(
    state: Mapping[str, Tensor], initial: Mapping[str, Tensor], config: Any
) -> tuple[dict[str, Tensor], Any]:
    """The state and configuration of a plain adapter of twice the rank; both sets of names are PEFT's."""
    plain = {}
    for name, tensor in state.items():
        axis, sign = (1, -1) if ".lora_B." in name else (0, 1)
        plain[name] = torch.cat([tensor, sign * initial[name].to(tensor)], dim=axis)
    config = deepcopy(config)
    config.init_lora_weights = True
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2  # so that the scale stays
    config.r *= 2
    return plain, config


def split_plain_lora(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The trained factors, and those that the adapter started with, of what `as_plain_lora` returned."""
    trained, initial = {}, {}
    for name, tensor in state.items():
        axis, sign = (1, -1) if ".lora_B." in name else (0, 1)
        first, second = tensor.chunk(2, dim=axis)
        trained[name], initial[name] = first.contiguous(), (sign * second).contiguous()
    return trained, initial


@torch.no_grad()
def take_out_of_base(model: nn.Module, initial: Mapping[str, Tensor]) -> None:
    """Subtract s·B₀A₀ from the weights of the base as PEFT does, to the bit."""
    for name, module in model.named_modules():
        if (factor := initial.get(f"{name}.lora_A.weight")) is None:
            continue
        layer: Any = module
        weight = layer.get_base_layer().weight
        second = initial[f"{name}.lora_B.weight"].to(weight.device)
        change = layer.scaling["default"] * second @ factor.to(weight.device)
        original = weight.data.float()
        rest = (original.T - change).T if layer.fan_in_fan_out else original - change
        weight.data = rest.to(weight.dtype).contiguous()
