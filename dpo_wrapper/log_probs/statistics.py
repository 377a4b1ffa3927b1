"""Online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867) over the tiles of a vocabulary.

For each scored token the target is kept apart from the rest of the vocabulary. With `non_target_lse`, the
log-sum-exp over all entries but the target,

    log p(target) = log σ(target_logit - non_target_lse)

which is at most 0, and exact where p(target) is nearly 1: there the difference of a logit and the log-sum-exp
over the whole vocabulary would cancel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class OnlineSoftmax:
    """The statistics of all tiles so far: six values for each token, in one tensor."""

    values: Float[Tensor, "6 t"]

    @classmethod
    def initial(cls, tokens: int, device: torch.device, dtype: torch.dtype) -> "OnlineSoftmax":
        """The statistics before the first tile."""
        values = torch.zeros(6, tokens, device=device, dtype=dtype)
        values[0::5] = -torch.inf  # log-sum-exp and highest logit
        return cls(values)

    @property
    def non_target_lse(self) -> Float[Tensor, "t"]:
        """Log-sum-exp over the entries without the target; -inf where there is none."""
        return self.values[0]

    @property
    def target_logit(self) -> Float[Tensor, "t"]:
        """The target's logit, 0 until its tile has been included."""
        return self.values[1]

    @property
    def target_slope(self) -> Float[Tensor, "t"]:
        """The derivative of the target's logit by its raw product, 0 until its tile has been included."""
        return self.values[2]

    @property
    def entropy(self) -> Float[Tensor, "t"]:
        """Of the softmax over the entries without the target, as are the two that follow."""
        return self.values[3]

    @property
    def sum_p2(self) -> Float[Tensor, "t"]:
        return self.values[4]

    @property
    def max_logit(self) -> Float[Tensor, "t"]:
        return self.values[5]

    def select(self, token_slice: slice) -> "OnlineSoftmax":
        """The statistics of these tokens, in the same memory."""
        return OnlineSoftmax(self.values[:, token_slice])

    def update(
        self,
        tile_lse: Tensor,
        target_logit: Tensor,
        target_slope: Tensor,
        moments: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        """Include a tile of these tokens, in place.

        `target_logit` and `target_slope` are 0 where the tile does not hold the target, `moments` the
        tile's entropy, sum of p² and highest logit.
        """
        lse = torch.logaddexp(self.non_target_lse, tile_lse)
        if moments is not None:
            tile_entropy, tile_sum_p2, tile_max = moments
            finite_lse = lse.clamp(min=torch.finfo(lse.dtype).min)  # it may be -inf still
            old_share, new_share = (self.non_target_lse - finite_lse).exp(), (tile_lse - finite_lse).exp()
            components = ((old_share, self.entropy), (new_share, tile_entropy))
            self.entropy.copy_(mixture_entropy(components))
            self.sum_p2.mul_(old_share.square()).add_(new_share.square() * tile_sum_p2)
            torch.maximum(self.max_logit, tile_max, out=self.max_logit)
        self.non_target_lse.copy_(lse)
        self.target_logit.add_(target_logit)
        self.target_slope.add_(target_slope)

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
        values = (weight.log() + max_lse, target_logit, target_slope, entropy, sum_p2, max_logit)
        return OnlineSoftmax(torch.stack(values))

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
