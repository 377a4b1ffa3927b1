"""Which loss scores will be made into: knowing that, a trained head's gradients take less memory."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dpo_wrapper.batches.sequences import ScoredSequences, ScoredTree
from dpo_wrapper.log_probs import FusedLoss


@dataclass(frozen=True)
class Foretold:
    """A loss from Float[t], one score for each scored token, to Float[]; and which sequences meet in it.

    Each row of `links` holds the indices of two sequences that meet, such as the sides of a pair; None says
    that all do. So do those that are linked by others, or by tokens that are scored once for several.
    """

    loss: Callable[[Tensor], Tensor]
    links: Int[Tensor, "k 2"] | None

    def over_rows(self, sequences: ScoredSequences) -> FusedLoss:
        if self.links is None:
            return FusedLoss(self.loss)
        return FusedLoss(self.loss, groups(self.links, len(sequences.length))[sequences.row])

    def over_tree(self, sequences: ScoredSequences, tree: ScoredTree) -> FusedLoss:
        """For scores of the tree's entries."""
        row, entry = sequences.row, tree.entry

        def loss(scores: Tensor) -> Tensor:
            return self.loss(scores.index_select(0, entry))

        if self.links is None:
            return FusedLoss(loss)
        owner = row.new_zeros(len(tree.target)).scatter(0, entry, row)
        shares = row != owner[entry]
        shared = torch.stack([row[shares], owner[entry[shares]]], dim=1)
        return FusedLoss(loss, groups(torch.cat([self.links, shared]), len(sequences.length))[owner])


def groups(links: Int[Tensor, "k 2"], count: int) -> Int[Tensor, "s"]:
    """A number for each of `count` things, the same for those that are linked, however far apart."""
    above = list(range(count))

    def first_of(k: int) -> int:
        while above[k] != k:
            above[k] = k = above[above[k]]
        return k

    for one, other in links.unique(dim=0).tolist():
        first, second = sorted((first_of(one), first_of(other)))
        above[second] = first
    return torch.tensor([first_of(k) for k in range(count)], device=links.device)
