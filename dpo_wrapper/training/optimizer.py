"""The optimizer of a stage, and how its learning rate changes."""

import math

import torch
from torch import nn

from dpo_wrapper.training.config import TrainConfig


def create_optimizer(module: nn.Module, config: TrainConfig, learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer of the parameters that train."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=config.weight_decay)


def learning_rate_factor(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Linear rise over the first `warmup_ratio` of the steps, then a cosine to zero."""
    warmup_steps = math.ceil(num_steps * warmup_ratio)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, num_steps - warmup_steps)))
