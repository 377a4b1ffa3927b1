"""The loss of completions that have a label in place of a rival."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_wrapper.losses.base import Loss, beta_field, nonnegative_field
from dpo_wrapper.losses.inputs import UnpairedLogProbs


@dataclass(frozen=True)
class KTO(Loss):
    """`1 - σ(β(a - z)) or 1 - σ(β(z - b))` with `z = max(0, KL)`.

    The first is for desirable completions, with log-ratio a, the second for undesirable ones, with log-ratio
    b. The KL divergence is estimated from prompts with completions of other prompts, and has no gradient.
    The options `desirable` and `undesirable` balance the numbers of the two.

    Paper: Ethayarajh 2024 (arXiv 2402.01306)
    For: completions with a label, desirable or not, instead of pairs (`UnpairedBatch`)
    """

    log_probs_type = UnpairedLogProbs
    beta: float = beta_field()
    desirable: float = nonnegative_field(1.0, "weight of desirable completions")
    undesirable: float = nonnegative_field(1.0, "weight of undesirable completions")

    def __call__(self, rows: UnpairedLogProbs) -> Float[Tensor, "r"]:
        kl = rows.kl.detach().clamp(min=0)
        above_kl = self.beta * (rows.logratio - kl)
        desirable, undesirable = torch.sigmoid(-above_kl), torch.sigmoid(above_kl)
        return torch.where(rows.label, self.desirable * desirable, self.undesirable * undesirable)
