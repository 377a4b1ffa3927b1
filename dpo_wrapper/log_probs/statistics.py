"""What is known of each token's softmax when some tiles of the vocabulary have been seen."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.distributed import ProcessGroup


class Folded(NamedTuple):
    """What a fold makes of a tile. `block` is d lse / d (hidden @ weightᵀ), 0 at targets; with a total given
    it is the softmax against that instead, less 1 at targets, times slopes."""

    block: Float[Tensor, "r w"]
    lse: Float[Tensor, "r"]
    """Log-sum-exp over the words of the tile that are no target."""
    own: Float[Tensor, "r"]
    """Logit of the target where it is in the tile, else 0."""
    slope: Float[Tensor, "r"]
    """d logit / d (hidden @ weightᵀ) of the target where it is in the tile, else 0."""
    moments: tuple[Tensor, Tensor, Tensor] | None
    """Of the tile's own softmax, if asked for: its entropy, Σ p², and the highest logit."""


class Statistics(NamedTuple):
    """Of all tiles so far, per token: log-sum-exp over words that are no target; the target's logit and its
    slope; and the moments of the softmax over all words that are no target."""

    lse: Float[Tensor, "t"]
    own: Float[Tensor, "t"]
    slope: Float[Tensor, "t"]
    entropy: Float[Tensor, "t"]
    squares: Float[Tensor, "t"]
    highest: Float[Tensor, "t"]

    @classmethod
    def of_nothing(cls, zeros: Float[Tensor, "t"]) -> "Statistics":
        low = -torch.inf
        return cls(*(torch.full_like(zeros, fill) for fill in (low, 0.0, 0.0, 0.0, 0.0, low)))

    def add(self, rows: slice, folded: Folded) -> None:
        """Take a tile in."""
        lse, own, slope, entropy, squares, highest = (value[rows] for value in self)
        total = torch.logaddexp(lse, folded.lse)
        if folded.moments is not None:
            of_tile = folded.moments
            safe = total.clamp(min=torch.finfo(total.dtype).min)  # where there was nothing yet
            before, now = (lse - safe).exp(), (folded.lse - safe).exp()
            mixed = mixed_entropy(((before, entropy), (now, of_tile[0])))
            entropy.copy_(mixed)
            squares.mul_(before.square()).add_(now.square() * of_tile[1])
            torch.maximum(highest, of_tile[2], out=highest)
        lse.copy_(total)
        own.add_(folded.own)
        slope.add_(folded.slope)

    def over(self, group: ProcessGroup) -> "Statistics":
        """The same over the vocabulary of all processes, each of which has seen its part."""
        both = torch.stack([self.lse, self.highest])
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX, group=group)
        safe = both[0].clamp(min=torch.finfo(both.dtype).min)
        part = (self.lse - safe).exp()
        sums = [
            part,
            self.own,
            self.slope,
            part * (self.entropy + safe - self.lse),
            part.square() * self.squares,
        ]
        sums[3] = sums[3].where(part > 0, 0.0)
        part, own, slope, entropy, squares = summed(torch.stack(sums), group).unbind()
        some = part > 0  # there may be no word but the target
        entropy = (entropy / part + part.log()).where(some, 0.0)  # of a mixture, as in `mixed_entropy`
        squares = (squares / part.square()).where(some, 0.0)
        return Statistics(part.log() + safe, own, slope, entropy, squares, both[1])

    @property
    def total(self) -> Float[Tensor, "t"]:
        """Log-sum-exp over the whole vocabulary."""
        return torch.logaddexp(self.lse, self.own)

    @property
    def at_target(self) -> Float[Tensor, "t"]:
        """d log-prob / d (hidden @ weightᵀ) at the target, as exact as it can be told."""
        return (self.lse - self.total).exp() * self.slope

    @property
    def log_probs(self) -> Float[Tensor, "t"]:
        return F.logsigmoid(self.own - self.lse)

    def extras(self) -> tuple[Tensor, ...]:
        """As `EXTRAS` names them."""
        total, log_probs, of_others = self.total, self.log_probs, F.logsigmoid(self.lse - self.own)
        parts = ((of_others.exp(), self.entropy), (log_probs.exp(), torch.zeros_like(log_probs)))
        entropy = mixed_entropy(parts)
        squares = torch.logaddexp(2 * of_others + self.squares.log(), 2 * log_probs)
        top1 = self.own >= self.highest
        return entropy, squares, top1, log_probs.where(top1, self.highest - total)


def mixed_entropy(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Entropy of distributions over different words that are mixed, from their weights and own entropies."""
    return torch.stack([w * entropy - torch.xlogy(w, w) for w, entropy in parts]).sum(dim=0)


def summed(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Summed over the processes of a group, in place."""
    if group is not None:
        torch.distributed.all_reduce(values, group=group)
    return values
