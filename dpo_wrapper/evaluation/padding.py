"""Whether a model continues padded prompts as it continues them alone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_wrapper.evaluation.generate import continue_prompts
from dpo_wrapper.models.eval_mode import eval_mode

MAX_TRIAL_TOKENS = 16
NUM_STEPS = 3
"""Tokens that are generated in the trial: the first of the prompt as a whole, the others of cached keys."""

TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Relative error of logits, by the model's dtype."""


@torch.no_grad()
def computes_padding_alike(model: Any, prompt: Sequence[int]) -> bool:
    """Whether logits behind a prompt are the same, up to rounding, with padding on its left and without.

    They are not where layers carry a state along the sequence through padding, or positions are counted from
    the padding on. A shorter and a longer piece of the prompt are continued by three given tokens, alone and
    together. True for a prompt of one token, in which there is nothing to pad.

    Args:
        model: as in `generate`.
        prompt: token ids, more than one of which the first 16 are used.
    """
    long = list(prompt[:MAX_TRIAL_TOKENS])
    short = long[: (len(long) + 1) // 2]
    if len(short) == len(long):
        return True
    with eval_mode(model):
        try:
            padded = compute_logits(model, [short, long], short[0])[:, 0]
        except (RuntimeError, ValueError, TypeError, AssertionError):  # a model that takes no padding
            return False
        alone = compute_logits(model, [short], short[0])[:, 0]
    tolerance = TOLERANCES.get(next(model.parameters()).dtype, 0.05)
    return bool((padded - alone).norm() <= tolerance * alone.norm())


def compute_logits(model: Any, prompts: Sequence[Sequence[int]], token: int) -> Tensor:
    """Float[steps b v]: the logits behind prompts that are continued by one token over and over."""
    steps: list[Tensor] = []

    def choose(logits: Tensor) -> Tensor:
        steps.append(logits.float())
        return torch.full((len(logits),), token, device=logits.device)

    other = int(token == 0)  # an end that does not come
    continue_prompts(model, prompts, NUM_STEPS, [other], choose)
    return torch.stack(steps[:NUM_STEPS])
