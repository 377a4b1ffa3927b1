"""Losses of ranked lists, and of rows with a label in place of a rival."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from beartype import beartype
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor

from dpo_wrapper.losses.base import Objective, not_negative, pull


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class RankedLogProbs:
    """Sums in nats of the completions of each list, the best first; `real` is False where a list has ended.

    `l` lists of up to `k` completions. `reference` is None where there is none. `length` counts scored
    tokens, and `weights`, if the data has any, multiply the lists' losses.
    """

    unit: ClassVar[str] = "lists"

    policy: Float[Tensor, "l k"]
    reference: Float[Tensor, "l k"] | None
    real: Bool[Tensor, "l k"]
    length: Int[Tensor, "l k"] | None = None
    weights: Float[Tensor, "l"] | None = None

    @property
    def logratio(self) -> Float[Tensor, "l k"]:
        return self.policy if self.reference is None else self.policy - self.reference


@dataclass(frozen=True)
class PlackettLuce(Objective):
    """DPO of a ranking: `-Σ_k (βa_k - log Σ_{j ≥ k} e^(βa_j))` with `a_k = p_k - r_k`.

    Completion 1 is the best of the list. With two completions it is DPO.

    Paper: Rafailov 2023 (arXiv 2305.18290), appendix A.3
    For: ranked lists instead of pairs (`RankedBatch`)
    """

    data: ClassVar[Any] = RankedLogProbs

    beta: float = pull()

    def __call__(self, lists: RankedLogProbs) -> Float[Tensor, "l"]:
        scores = (self.beta * lists.logratio).masked_fill(~lists.real, 0.0)
        smallest = torch.finfo(scores.dtype).min / 4  # finite, so that gradients are
        rest = scores.masked_fill(~lists.real, smallest).flip(-1).logcumsumexp(dim=-1).flip(-1)
        return (rest - scores).masked_fill(~lists.real, 0.0).sum(dim=-1)


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class UnpairedLogProbs:
    """Sums in nats of single completions, and `label`, True on those that are wanted.

    `shift` is an estimate of how far the policy is from the reference in nats: the mean log-ratio of prompts
    with completions of other prompts. `length` counts scored tokens, and `weights`, if the data has any,
    multiply the rows' losses.
    """

    unit: ClassVar[str] = "rows"

    policy: Float[Tensor, "r"]
    reference: Float[Tensor, "r"] | None
    label: Bool[Tensor, "r"]
    shift: Float[Tensor, ""]
    length: Int[Tensor, "r"] | None = None
    weights: Float[Tensor, "r"] | None = None

    @property
    def logratio(self) -> Float[Tensor, "r"]:
        return self.policy if self.reference is None else self.policy - self.reference


@dataclass(frozen=True)
class KTO(Objective):
    """`1 - σ(β(a - z)) or 1 - σ(β(z - b))` with `z = max(0, KL)`.

    The first for rows that are wanted, with log-ratio a, the second for others, with log-ratio b. The KL is
    estimated from mismatched prompts and completions of the same batch, and has no gradient. The two kinds of
    rows are multiplied by `desirable` and `undesirable`, to balance their numbers.

    Paper: Ethayarajh 2024 (arXiv 2402.01306)
    For: rows with a label, wanted or not, instead of pairs (`UnpairedBatch`)
    """

    data: ClassVar[Any] = UnpairedLogProbs

    beta: float = pull()
    desirable: float = not_negative(1.0, "weight of rows that are wanted")
    undesirable: float = not_negative(1.0, "weight of rows that are not")

    def __call__(self, rows: UnpairedLogProbs) -> Float[Tensor, "r"]:
        shift = rows.shift.detach().clamp(min=0)
        above = self.beta * (rows.logratio - shift)
        wanted, unwanted = torch.sigmoid(-above), torch.sigmoid(above)
        return torch.where(rows.label, self.desirable * wanted, self.undesirable * unwanted)
