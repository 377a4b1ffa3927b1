"""Losses that need no reference."""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dpo_wrapper.losses.base import (
    PairLoss,
    clamp_exponent,
    label_smoothing_field,
    log1mexp,
    nonnegative_field,
    number_field,
    positive_field,
)
from dpo_wrapper.losses.inputs import PairLogProbs
from dpo_wrapper.losses.pairwise import logistic_loss


@dataclass(frozen=True)
class SFT(PairLoss):
    """`-p_w / mean(n_w)`.

    The mean over pairs is minus the mean log-prob of all scored chosen tokens.

    Paper: Pang 2024 (arXiv 2404.19733)
    For: added to another, keeps the chosen log-prob from falling
    """

    needs_reference = False
    has_rewards = False

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        return pairs.chosen_nll


@dataclass(frozen=True)
class ReferenceFree(PairLoss):
    """`-(1 - ε) log σ(β(p_w - p_l)) - ε log σ(-β(p_w - p_l))`.

    The simplified form: DPO whose reference gives every answer the same probability.

    Paper: Rafailov 2023 (arXiv 2305.18290), eq. 7 with r = 0
    For: half the work, where nothing need hold the policy
    """

    needs_reference = False
    has_margin = True
    beta: float = positive_field(0.1, "scale of the log-probs")
    label_smoothing: float = label_smoothing_field()

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        logits = pairs.subtract_margin(self.beta * (pairs.chosen - pairs.rejected))
        return logistic_loss(logits, self.label_smoothing)

    def reward(self, policy: Tensor, reference: Tensor | None, length: Tensor) -> Tensor:
        """`βp`."""
        return self.beta * policy


@dataclass(frozen=True)
class CPO(ReferenceFree):
    """`-(1 - ε) log σ(β(p_w - p_l)) - ε log σ(-β(p_w - p_l)) - α p_w / mean(n_w)`.

    Paper: Xu 2024 (arXiv 2401.08417)
    For: no reference, held by the likelihood of chosen instead
    """

    alpha: float = nonnegative_field(1.0, "weight α of the likelihood of chosen")

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        return super().__call__(pairs) + self.alpha * pairs.chosen_nll


@dataclass(frozen=True)
class SimPO(PairLoss):
    """`-log σ(β(p_w / n_w - p_l / n_l) - γ)`.

    Paper: Meng 2024 (arXiv 2405.14734), eq. 6
    For: half the work, and no reward for length
    """

    needs_reference = False
    is_per_token = True
    has_margin = True
    beta: float = positive_field(2.0, "scale of the mean log-probs")
    gamma: float = nonnegative_field(0.5, "margin that chosen should keep over rejected")

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        chosen, rejected = self.rewards(pairs)
        return -F.logsigmoid(pairs.subtract_margin(chosen - rejected - self.gamma))

    def reward(self, policy: Tensor, reference: Tensor | None, length: Tensor) -> Tensor:
        """`βp / n`."""
        return self.beta * policy / length


@dataclass(frozen=True)
class AlphaPO(SimPO):
    """`-log σ(β(f(p_w / n_w) - f(p_l / n_l)) - γ)` with `f(x) = (1 - e^(-αx)) / α`.

    α = 0 is SimPO. f is constant where the exponential would overflow.

    Paper: Gupta 2025 (arXiv 2501.03884)
    For: SimPO with a reward of another shape
    """

    alpha: float = number_field(0.25, "α, the shape of the reward; 0 takes the mean log-prob itself")

    def reward(self, policy: Tensor, reference: Tensor | None, length: Tensor) -> Tensor:
        """`βf(p / n)`."""
        mean = policy / length
        shaped = mean if self.alpha == 0 else -clamp_exponent(-self.alpha * mean).expm1() / self.alpha
        return self.beta * shaped


@dataclass(frozen=True)
class ORPO(PairLoss):
    """`-p_w / mean(n_w) - β log σ(o)` with `o = logit(e^(p_w / n_w)) - logit(e^(p_l / n_l))`.

    `logit(e^x) = x - log(1 - e^x)`, the log-odds, is accurate near e^x = 1.

    Paper: Hong 2024 (arXiv 2403.07691)
    For: supervised training and preferences in one
    """

    needs_reference = False
    is_per_token = True
    beta: float = positive_field(0.1, "weight of the odds ratio")

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        chosen, rejected = pairs.chosen_mean, pairs.rejected_mean
        odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
        return pairs.chosen_nll - self.beta * F.logsigmoid(odds)

    def reward(self, policy: Tensor, reference: Tensor | None, length: Tensor) -> Tensor:
        """`βp / n`, which has the order of the log-odds."""
        return self.beta * policy / length
