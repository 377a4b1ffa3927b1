"""Losses of the two log-ratios `a` and `b`, and not of their difference alone."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dpo_wrapper.losses.base import PairLoss, beta_field
from dpo_wrapper.losses.inputs import PairLogProbs


@dataclass(frozen=True)
class NCA(PairLoss):
    """`-log σ(βa) - ½ log σ(-βa) - ½ log σ(-βb)`.

    Paper: Chen 2024 (arXiv 2402.05369)
    For: keeping the chosen log-prob from falling
    """

    beta: float = beta_field()

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        chosen, rejected = self.beta * pairs.chosen_logratio, self.beta * pairs.rejected_logratio
        return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@dataclass(frozen=True)
class BCO(PairLoss):
    """`-log σ(βa) - log σ(-βb)`.

    For pairs, without the paper's running shift δ.

    Paper: Jung 2024 (arXiv 2404.04656)
    For: sides that are good and bad by themselves; a part of MPO
    """

    beta: float = beta_field()

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        chosen, rejected = self.beta * pairs.chosen_logratio, self.beta * pairs.rejected_logratio
        return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


@dataclass(frozen=True)
class SPPO(PairLoss):
    """`(a - 1 / (2β))² + (b + 1 / (2β))²`.

    With hard labels: the winner wins with probability 1.

    Paper: Wu 2024 (arXiv 2405.00675)
    For: rounds of self-play
    """

    beta: float = beta_field()

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        target = 1 / (2 * self.beta)
        return (pairs.chosen_logratio - target).square() + (pairs.rejected_logratio + target).square()


@dataclass(frozen=True)
class APOZero(PairLoss):
    """`1 - σ(βa) + σ(βb)`.

    Paper: D'Oosterlinck 2024 (arXiv 2408.06266)
    For: chosen answers that are better than what the model writes
    """

    beta: float = beta_field()

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        chosen, rejected = self.beta * pairs.chosen_logratio, self.beta * pairs.rejected_logratio
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@dataclass(frozen=True)
class APODown(PairLoss):
    """`σ(βa) + 1 - σ(β(a - b))`.

    Paper: D'Oosterlinck 2024 (arXiv 2408.06266)
    For: chosen answers that are worse than what the model writes
    """

    beta: float = beta_field()

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        chosen, rejected = self.beta * pairs.chosen_logratio, self.beta * pairs.rejected_logratio
        return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)
