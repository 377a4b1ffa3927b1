"""Losses of `Δ = s_w - s_l`, the difference of the two sides' scores."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dpo_wrapper.losses.base import (
    PairLoss,
    beta_field,
    clamp_exponent,
    label_smoothing_field,
    nonnegative_field,
    number_field,
    positive_field,
)
from dpo_wrapper.losses.divergences import Divergence, divergence_field
from dpo_wrapper.losses.inputs import PairLogProbs, log_ratio


def logit_difference(pairs: PairLogProbs, divergence: Divergence) -> Float[Tensor, "p"]:
    """`Δ = s_w - s_l`, from sums over tokens."""
    return divergence(pairs.chosen_logratio) - divergence(pairs.rejected_logratio)


def logistic_loss(logits: Float[Tensor, "p"], label_smoothing: float) -> Float[Tensor, "p"]:
    """`-(1 - ε) log σ(z) - ε log σ(-z)`, for logits z and ε = `label_smoothing`."""
    loss = -(1 - label_smoothing) * F.logsigmoid(logits)
    return loss - label_smoothing * F.logsigmoid(-logits) if label_smoothing else loss


@dataclass(frozen=True)
class Sigmoid(PairLoss):
    """DPO: `-(1 - ε) log σ(βΔ) - ε log σ(-βΔ)`.

    ε > 0 is conservative DPO, for labels that are wrong with probability ε.

    Paper: Rafailov 2023 (arXiv 2305.18290), eq. 7; Mitchell 2023 for ε
    For: the usual choice; ε > 0 where labels are noisy
    """

    has_margin = True
    beta: float = beta_field()
    label_smoothing: float = label_smoothing_field()
    divergence: Divergence = divergence_field()

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        logits = pairs.subtract_margin(self.beta * logit_difference(pairs, self.divergence))
        return logistic_loss(logits, self.label_smoothing)


@dataclass(frozen=True)
class SigmoidNorm(PairLoss):
    """DPO on scores per token: `-log σ(β(s_w / n_w - s_l / n_l))`.

    Each side's score is divided by its number of scored tokens, as x-transformers' `DPO` intends.

    Paper: x-transformers
    For: completions of very different lengths
    """

    has_margin = True
    is_per_token = True
    beta: float = beta_field()
    divergence: Divergence = divergence_field()

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        chosen, rejected = self.rewards(pairs)
        return -F.logsigmoid(pairs.subtract_margin(chosen - rejected))

    def reward(self, policy: Tensor, reference: Tensor | None, length: Tensor) -> Tensor:
        """`βs / n`, with the score s of `p - r`."""
        return self.beta * self.divergence(log_ratio(policy, reference)) / length


@dataclass(frozen=True)
class Robust(PairLoss):
    """`(-(1 - ε) log σ(βΔ) + ε log σ(-βΔ)) / (1 - 2ε)`.

    Its mean over labels that are wrong with probability ε is the loss of the right labels. It has no lower
    bound for ε > 0.

    Paper: Chowdhury 2024 (arXiv 2403.00409)
    For: labels that are wrong at a known rate ε
    """

    has_margin = True
    beta: float = beta_field()
    label_smoothing: float = label_smoothing_field(0.1)
    divergence: Divergence = divergence_field()

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        logits = pairs.subtract_margin(self.beta * logit_difference(pairs, self.divergence))
        right, wrong = -F.logsigmoid(logits), -F.logsigmoid(-logits)
        wrong_rate = self.label_smoothing
        return ((1 - wrong_rate) * right - wrong_rate * wrong) / (1 - 2 * wrong_rate)


@dataclass(frozen=True)
class Hinge(PairLoss):
    """SLiC: `max(0, 1 - βΔ)`.

    Paper: Zhao 2023 (arXiv 2305.10425); Liu 2023 (arXiv 2309.06657)
    For: leaving pairs alone once they are far enough apart
    """

    has_margin = True
    beta: float = beta_field()
    divergence: Divergence = divergence_field()

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        return F.relu(1 - pairs.subtract_margin(self.beta * logit_difference(pairs, self.divergence)))


@dataclass(frozen=True)
class IPO(PairLoss):
    """`(s_w / n_w - s_l / n_l - 1 / (2β))²`.

    The mean over tokens takes the place of the sum, as the authors recommend; the loss is 0 at a margin of
    1 / (2β).

    Paper: Azar 2023 (arXiv 2310.12036), eq. 17
    For: margins that do not run away
    """

    is_per_token = True
    beta: float = beta_field()
    divergence: Divergence = divergence_field()

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        chosen, rejected = self.rewards(pairs)
        return ((chosen - rejected - 0.5) / self.beta).square()

    def reward(self, policy: Tensor, reference: Tensor | None, length: Tensor) -> Tensor:
        """`βs / n`, with the score s of `p - r`: the loss is 0 where two rewards are 1/2 apart."""
        return self.beta * self.divergence(log_ratio(policy, reference)) / length


@dataclass(frozen=True)
class EXO(PairLoss):
    """`σ(βΔ)(log σ(βΔ) - log(1 - ε)) + σ(-βΔ)(log σ(-βΔ) - log ε)`.

    The KL divergence of the policy's choice between the two sides from the smoothed labels (1 - ε, ε): the
    reverse of the direction that cross-entropy has.

    Paper: Ji 2024 (arXiv 2402.00856), eq. 16
    For: a policy that keeps to the best answers instead of covering all
    """

    beta: float = beta_field()
    label_smoothing: float = number_field(
        1e-3,
        "probability ε that a label is the wrong way round, in (0, 0.5)",
        "be in (0, 0.5)",
        lambda value: 0 < value < 0.5,
    )
    divergence: Divergence = divergence_field()

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        logits = self.beta * logit_difference(pairs, self.divergence)
        right = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-self.label_smoothing))
        return right + torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(self.label_smoothing))


@dataclass(frozen=True)
class DiscoPOP(PairLoss):
    """`-(1 - w) log σ(z) + w e^(-z)` with `z = βΔ, w = σ(z / τ)`.

    `w e^(-z)` is computed as one exponential, constant where that would overflow (which takes τ > 1).

    Paper: Lu 2024 (arXiv 2406.08414), eq. 5
    For: trying a loss that a language model found
    """

    beta: float = beta_field()
    tau: float = positive_field(0.05, "temperature τ of the blend of the two parts")
    divergence: Divergence = divergence_field()

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        logits = self.beta * logit_difference(pairs, self.divergence)
        blend = logits / self.tau
        exponential = clamp_exponent(F.logsigmoid(blend) - logits).exp()
        return exponential - torch.sigmoid(-blend) * F.logsigmoid(logits)


@dataclass(frozen=True)
class DPOP(PairLoss):
    """`-log σ(β(a - b - λ max(0, r_w - p_w)))`.

    The penalty is inside the sigmoid, as the paper has it.

    Paper: Pal 2024 (arXiv 2402.13228)
    For: pairs that differ in few tokens, where DPO lets the chosen log-prob fall
    """

    has_margin = True
    beta: float = beta_field()
    penalty: float = nonnegative_field(50.0, "λ, on what the chosen log-prob loses against the reference")

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        lost = F.relu(-pairs.chosen_logratio)
        gap = pairs.chosen_logratio - pairs.rejected_logratio
        return -F.logsigmoid(pairs.subtract_margin(self.beta * (gap - self.penalty * lost)))
