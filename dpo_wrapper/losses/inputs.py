"""The log-probs that losses are computed from: one frozen dataclass for each type of data.

All are sums in nats over the scored tokens of a completion, for the valid pairs, lists or rows alone.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from beartype import beartype
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor


def log_ratio(policy: Tensor, reference: Tensor | None) -> Tensor:
    """`p - r`; `p` itself without a reference."""
    return policy if reference is None else policy - reference


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class PairLogProbs:
    """Log-probs of `p` preference pairs; half precision is widened to float32.

    Attributes:
        chosen, rejected: the policy's sums, `p_w` and `p_l`.
        ref_chosen, ref_rejected: the reference's sums, `r_w` and `r_l`; None without a reference.
        chosen_length, rejected_length: numbers of scored tokens, `n_w` and `n_l`.
        mean_chosen_length: mean of `chosen_length` over all pairs of the optimizer step, of which these
            pairs may be a part.
        margins: nats by which chosen should win, from the data.
        weights: factors of the pairs' losses, from the data or from WPO.
        unweighted_chosen: `p_w` with every token counted fully, where LD-DPO has made `chosen` smaller.
    """

    dataset_type: ClassVar[str] = "preference"

    chosen: Float[Tensor, "p"]
    rejected: Float[Tensor, "p"]
    ref_chosen: Float[Tensor, "p"] | None
    ref_rejected: Float[Tensor, "p"] | None
    chosen_length: Int[Tensor, "p"]
    rejected_length: Int[Tensor, "p"]
    mean_chosen_length: Float[Tensor, ""]
    margins: Float[Tensor, "p"] | None = None
    weights: Float[Tensor, "p"] | None = None
    unweighted_chosen: Float[Tensor, "p"] | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
                object.__setattr__(self, name, value.float())

    @property
    def chosen_logratio(self) -> Float[Tensor, "p"]:
        """`a = p_w - r_w`; `p_w` itself without a reference."""
        return log_ratio(self.chosen, self.ref_chosen)

    @property
    def rejected_logratio(self) -> Float[Tensor, "p"]:
        """`b = p_l - r_l`; `p_l` itself without a reference."""
        return log_ratio(self.rejected, self.ref_rejected)

    @property
    def chosen_mean(self) -> Float[Tensor, "p"]:
        """`p_w / n_w`, nats per token."""
        return self.chosen / self.chosen_length

    @property
    def rejected_mean(self) -> Float[Tensor, "p"]:
        """`p_l / n_l`, nats per token."""
        return self.rejected / self.rejected_length

    @property
    def chosen_nll(self) -> Float[Tensor, "p"]:
        """`-p_w / mean(n_w)`: its mean over pairs is minus the mean log-prob of all chosen tokens."""
        chosen = self.chosen if self.unweighted_chosen is None else self.unweighted_chosen
        return -chosen / self.mean_chosen_length

    def subtract_margin(self, logits: Float[Tensor, "p"]) -> Float[Tensor, "p"]:
        """`logits - margins`, where the data has margins."""
        return logits if self.margins is None else logits - self.margins


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class RankedLogProbs:
    """Log-probs of `l` ranked lists of up to `k` completions, the best first.

    Attributes:
        policy, reference: sums; `reference` is None without one.
        is_real: False in the places behind the end of a list.
        length: numbers of scored tokens.
        weights: factors of the lists' losses, from the data.
    """

    dataset_type: ClassVar[str] = "ranked"

    policy: Float[Tensor, "l k"]
    reference: Float[Tensor, "l k"] | None
    is_real: Bool[Tensor, "l k"]
    length: Int[Tensor, "l k"] | None = None
    weights: Float[Tensor, "l"] | None = None

    @property
    def logratio(self) -> Float[Tensor, "l k"]:
        """`a = p - r`; `p` itself without a reference."""
        return log_ratio(self.policy, self.reference)


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class UnpairedLogProbs:
    """Log-probs of `r` completions with a label each.

    Attributes:
        policy, reference: sums; `reference` is None without one.
        label: True for a desirable completion, False for an undesirable one.
        kl: estimate of the KL divergence of policy and reference in nats: the mean log-ratio of prompts
            with completions of other prompts.
        length: numbers of scored tokens.
        weights: factors of the rows' losses, from the data.
    """

    dataset_type: ClassVar[str] = "unpaired_preference"

    policy: Float[Tensor, "r"]
    reference: Float[Tensor, "r"] | None
    label: Bool[Tensor, "r"]
    kl: Float[Tensor, ""]
    length: Int[Tensor, "r"] | None = None
    weights: Float[Tensor, "r"] | None = None

    @property
    def logratio(self) -> Float[Tensor, "r"]:
        """`a = p - r`; `p` itself without a reference."""
        return log_ratio(self.policy, self.reference)
