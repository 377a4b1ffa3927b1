"""Inputs of log_probs.py with softmaxes like a language model's, and their log-probs in float64."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BETA = 0.1
SAMPLE = 16
"""The tokens that are compared with float64."""


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # [t, d]
    weight: Tensor  # [v, d]
    targets: Tensor  # [t]
    upstream: Tensor  # [t], the gradient of a DPO loss at its start
    sequence: int  # tokens of each sequence, chosen ones in the first half


def draw(t: int, d: int, v: int, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Targets whose frequencies follow Zipf's law, and hidden states that depend on their targets.

    Softmaxes then have a few likely entries and a long tail.
    """
    generator = torch.Generator(device).manual_seed(seed)
    frequency = -torch.arange(1.0, v + 1, device=device).log()  # [v], the most frequent entry first
    targets = torch.multinomial(frequency.exp(), t, replacement=True, generator=generator)
    weight = torch.randn(v, d, generator=generator, device=device).div_(math.sqrt(d))
    hidden = 2 * torch.randn(t, d, generator=generator, device=device) + 6 * weight[targets]
    shared = 1 / math.sqrt(d)  # a direction of length 1 that encodes the frequencies in hidden states
    weight += frequency[:, None] / 8 * shared
    hidden += 8 * shared
    upstream = torch.full((t,), BETA / 2, device=device)
    upstream[: t // 2] *= -1
    longest = min(256, t // 2)
    sequence = next(n for n in range(longest, 0, -1) if t % (2 * n) == 0)
    return Inputs(hidden.to(dtype), weight.to(dtype), targets, upstream, sequence)


@dataclass(frozen=True)
class Truth:
    """Log-probs and gradients of a sample of tokens, in float64."""

    rows: Tensor
    log_probs: Tensor
    slopes: Tensor  # [r, d], d log-prob / d hidden


def truth(inputs: Inputs) -> Truth:
    rows = torch.linspace(0, len(inputs.targets) - 1, SAMPLE, device=inputs.hidden.device).long().unique()
    hidden = inputs.hidden[rows].double().requires_grad_()
    log_p = (hidden @ inputs.weight.double().T).log_softmax(dim=-1)
    log_probs = log_p.gather(-1, inputs.targets[rows][:, None])[:, 0]
    (slopes,) = torch.autograd.grad(log_probs.sum(), hidden)
    return Truth(rows, log_probs.detach(), slopes)
