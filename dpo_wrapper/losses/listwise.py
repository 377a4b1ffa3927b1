"""The loss of ranked lists."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_wrapper.losses.base import Loss, beta_field
from dpo_wrapper.losses.inputs import RankedLogProbs


@dataclass(frozen=True)
class PlackettLuce(Loss):
    """DPO of a ranking: `-Σ_k (βa_k - log Σ_{j ≥ k} e^(βa_j))` with `a_k = p_k - r_k`.

    Completion 1 is the best of the list. With two completions it is DPO.

    Paper: Rafailov 2023 (arXiv 2305.18290), appendix A.3
    For: ranked lists instead of pairs (`RankedBatch`)
    """

    log_probs_type = RankedLogProbs
    beta: float = beta_field()

    def __call__(self, lists: RankedLogProbs) -> Float[Tensor, "l"]:
        scores = (self.beta * lists.logratio).masked_fill(~lists.is_real, 0.0)
        lowest = torch.finfo(scores.dtype).min / 4  # finite, so that gradients are
        log_sums = scores.masked_fill(~lists.is_real, lowest).flip(-1).logcumsumexp(dim=-1).flip(-1)
        return (log_sums - scores).masked_fill(~lists.is_real, 0.0).sum(dim=-1)
