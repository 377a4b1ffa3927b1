"""Online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867) over the tiles of a vocabulary.

For each scored token the target is kept apart from the rest of the vocabulary. With `non_target_lse`, the
log-sum-exp over all entries but the target,

    log p(target) = log σ(target_logit - non_target_lse)

which is at most 0, and exact where p(target) is nearly 1: there the difference of a logit and the log-sum-exp
over the whole vocabulary would cancel.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.distributed import ProcessGroup


class TileSoftmax(NamedTuple):
    """One tile of logits, r tokens by w vocabulary entries, after its softmax.

    A *slope* is the derivative of a logit by its raw product `hidden @ weight.T`: `logit_scale`, times the
    derivative of the softcap where there is one.
    """

    tile: Float[Tensor, "r w"]
    """The softmax over the tile's entries times their slopes, 0 at targets: d non_target_lse / d raw product.
    Where `tile_softmax` was given the `lse` of the whole vocabulary: minus d log-prob / d raw product."""
    non_target_lse: Float[Tensor, "r"]
    """Log-sum-exp over the tile's entries without the target; -inf where there is none."""
    target_logit: Float[Tensor, "r"]
    """The target's logit where the tile holds the target, else 0."""
    target_slope: Float[Tensor, "r"]
    """The target's slope where the tile holds the target, else 0."""
    moments: tuple[Tensor, Tensor, Tensor] | None
    """Of the softmax over the tile's entries without the target, if asked for: the entropy, Σ p², and the
    highest logit."""


class OnlineSoftmax(NamedTuple):
    """The statistics of all tiles so far, for each token."""

    non_target_lse: Float[Tensor, "t"]
    target_logit: Float[Tensor, "t"]
    target_slope: Float[Tensor, "t"]
    entropy: Float[Tensor, "t"]
    """Of the softmax over the entries without the target, as are the two that follow."""
    sum_p2: Float[Tensor, "t"]
    max_logit: Float[Tensor, "t"]

    @classmethod
    def initial(cls, zeros: Float[Tensor, "t"]) -> "OnlineSoftmax":
        """The statistics before the first tile, in the dtype and on the device of `zeros`."""
        return cls(*(torch.full_like(zeros, fill) for fill in (-torch.inf, 0.0, 0.0, 0.0, 0.0, -torch.inf)))

    def update(self, token_slice: slice, new: TileSoftmax) -> None:
        """Include a tile of these tokens, in place."""
        lse, target_logit, target_slope, entropy, sum_p2, max_logit = (x[token_slice] for x in self)
        updated_lse = torch.logaddexp(lse, new.non_target_lse)
        if new.moments is not None:
            new_entropy, new_sum_p2, new_max = new.moments
            finite_lse = updated_lse.clamp(min=torch.finfo(lse.dtype).min)  # it may be -inf still
            old_share, new_share = (lse - finite_lse).exp(), (new.non_target_lse - finite_lse).exp()
            entropy.copy_(mixture_entropy(((old_share, entropy), (new_share, new_entropy))))
            sum_p2.mul_(old_share.square()).add_(new_share.square() * new_sum_p2)
            torch.maximum(max_logit, new_max, out=max_logit)
        lse.copy_(updated_lse)
        target_logit.add_(new.target_logit)
        target_slope.add_(new.target_slope)

    def all_reduce(self, group: ProcessGroup) -> "OnlineSoftmax":
        """The statistics of the whole vocabulary, of which each process of the group holds one slice."""
        maxima = torch.stack([self.non_target_lse, self.max_logit])
        torch.distributed.all_reduce(maxima, torch.distributed.ReduceOp.MAX, group=group)
        max_lse, max_logit = maxima
        max_lse = max_lse.clamp(min=torch.finfo(maxima.dtype).min)
        weight = (self.non_target_lse - max_lse).exp()  # of this process, relative to the largest one
        entropy = (weight * (self.entropy + max_lse - self.non_target_lse)).where(weight > 0, 0.0)
        sum_p2 = weight.square() * self.sum_p2
        sums = torch.stack([weight, self.target_logit, self.target_slope, entropy, sum_p2])
        weight, target_logit, target_slope, entropy, sum_p2 = sum_over(sums, group).unbind()
        is_present = weight > 0  # the target may be the only entry
        entropy = (entropy / weight + weight.log()).where(is_present, 0.0)  # as in `mixture_entropy`
        sum_p2 = (sum_p2 / weight.square()).where(is_present, 0.0)
        return OnlineSoftmax(weight.log() + max_lse, target_logit, target_slope, entropy, sum_p2, max_logit)

    @property
    def lse(self) -> Float[Tensor, "t"]:
        """Log-sum-exp over the whole vocabulary, target included."""
        return torch.logaddexp(self.non_target_lse, self.target_logit)

    @property
    def target_grad(self) -> Float[Tensor, "t"]:
        """The derivative d log-prob / d raw product at the target, without cancellation.

        It is (1 - p(target)) times the target's slope.
        """
        return (self.non_target_lse - self.lse).exp() * self.target_slope

    @property
    def log_probs(self) -> Float[Tensor, "t"]:
        """Log-probs of the targets, in nats."""
        return F.logsigmoid(self.target_logit - self.non_target_lse)

    def compute_extras(self) -> tuple[Tensor, ...]:
        """The `EXTRAS` in their order, over the whole vocabulary."""
        log_probs, log_rest = self.log_probs, F.logsigmoid(self.non_target_lse - self.target_logit)
        entropy = mixture_entropy(
            ((log_rest.exp(), self.entropy), (log_probs.exp(), torch.zeros_like(log_probs)))
        )
        log_sum_p2 = torch.logaddexp(2 * log_rest + self.sum_p2.log(), 2 * log_probs)
        top1 = self.target_logit >= self.max_logit
        return entropy, log_sum_p2, top1, log_probs.where(top1, self.max_logit - self.lse)


def mixture_entropy(components: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The entropy of a mixture of distributions without a common entry, from their weights and entropies."""
    return torch.stack([w * entropy - torch.xlogy(w, w) for w, entropy in components]).sum(dim=0)


def sum_over(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over the processes of a group, in place; `values` themselves without one."""
    if group is not None:
        torch.distributed.all_reduce(values, group=group)
    return values
