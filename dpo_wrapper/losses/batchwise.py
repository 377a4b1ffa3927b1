"""Losses that compare the pairs of a batch with one another.

The batch is what one forward pass has. Where an optimizer step takes several forward passes (micro-batches,
or several processes), each is sorted or averaged by itself, so the step differs from one in a single pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dpo_wrapper.losses.base import (
    PairLoss,
    beta_field,
    label_smoothing_field,
    nonnegative_field,
    number_field,
)
from dpo_wrapper.losses.inputs import PairLogProbs
from dpo_wrapper.losses.pairwise import logistic_loss

DECAY = 0.9
"""The part of BetaDPO's running statistics that stays at each step."""
MIN_BETA = 1e-3
"""The smallest β that BetaDPO adapts to."""


@dataclass(frozen=True)
class AOT(PairLoss):
    """`-(1 - ε) log σ(βd) - ε log σ(-βd)` with `d = sort(p_w - p_l) - sort(r_w - r_l)` over the batch.

    Value k belongs to the k-th smallest differences, not to pair k. The pairs of one forward pass are sorted.

    Paper: Melnyk 2024 (arXiv 2406.05882)
    For: preferring chosen as a whole distribution; large batches
    """

    is_per_pair = False
    beta: float = beta_field()
    label_smoothing: float = label_smoothing_field()

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        difference = (pairs.chosen - pairs.rejected).sort().values
        if pairs.ref_chosen is not None and pairs.ref_rejected is not None:
            difference = difference - (pairs.ref_chosen - pairs.ref_rejected).sort().values
        return logistic_loss(self.beta * difference, self.label_smoothing)


@dataclass(frozen=True)
class AOTUnpaired(AOT):
    """`-(1 - ε) log σ(βd) - ε log σ(-βd)` with `d = sort(a) - sort(b)` over the batch.

    Value k belongs to the k-th smallest log-ratios, not to pair k. The pairs of one forward pass are sorted.

    Paper: Melnyk 2024 (arXiv 2406.05882)
    For: AOT where the two sides answer different prompts
    """

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        difference = pairs.chosen_logratio.sort().values - pairs.rejected_logratio.sort().values
        return logistic_loss(self.beta * difference, self.label_smoothing)


def decay_towards(running: Tensor, value: Tensor) -> Tensor:
    """The running mean or standard deviation after a step with this value."""
    return (1 - DECAY) * value + DECAY * running


class RunningStatistics(nn.Module):
    """Exponential running mean and standard deviation of `A = a - b` over optimizer steps, 0 at the start.

    `add` collects the pairs of a step's forward passes and `end_step` moves the buffers once, however the
    step is split. Checkpoints hold the buffers, and not the sums of a step that is under way.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.zeros(()))
        self.discard_step()

    def discard_step(self) -> None:
        """Forget the sums of the current step."""
        self.step_sums = [0.0, 0.0, 0.0]

    @torch.no_grad()
    def add(self, values: Float[Tensor, "p"]) -> None:
        """Add values to the sums of the current step, taken relative to the mean against rounding."""
        deviations = values.cpu().double() - self.mean.cpu().double()  # an Apple GPU has no float64
        new = (float(len(deviations)), deviations.sum().item(), deviations.square().sum().item())
        self.step_sums = [total + value for total, value in zip(self.step_sums, new, strict=True)]

    @torch.no_grad()
    def end_step(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Move the buffers; `reduce` sums a tensor over processes. A step without pairs moves nothing."""
        dtype = torch.float32 if reduce is not None else torch.float64
        sums = torch.tensor(self.step_sums, dtype=dtype, device="cpu")
        count, total, squares = (sums if reduce is None else reduce(sums)).tolist()
        self.discard_step()
        if count == 0:
            return
        variance = max(0.0, squares - total * total / count) / max(1.0, count - 1)
        mean = self.mean + total / count
        self.std.copy_(decay_towards(self.std, torch.full_like(mean, variance**0.5)))
        self.mean.copy_(decay_towards(self.mean, mean))


@dataclass(frozen=True)
class BetaDPO(PairLoss):
    """`-log σ(β'A)` with `A = a - b, β' = max(β(1 + k(mean(A) - M)), 0.001)`.

    `M` is the running mean of A over the steps, this batch included: 0.9 of it stays at each step, and it
    starts at 0. `mean(A)` is over the pairs of one forward pass, and β' has no gradient. With `drop` > 0,
    that part of the pairs is left out at random, unlikely ones first: a pair's weight is the density at A of
    a normal distribution with mean M and the running standard deviation.

    The loss holds the running statistics, so give each `DPO` a loss of its own.

    Paper: Wu 2024 (arXiv 2407.08639), eq. 10, and its code
    For: data whose pairs are now close, now far apart
    """

    statistics: ClassVar[RunningStatistics]  # of each instance; no option, so no field
    has_margin = True
    is_per_pair = False
    beta: float = beta_field()
    k: float = nonnegative_field(0.6, "how much β follows the mean of A over the batch")
    drop: float = number_field(
        0.0, "part of the pairs left out, in [0, 1)", "be in [0, 1)", lambda value: 0 <= value < 1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "statistics", RunningStatistics())
        object.__setattr__(self, "is_deterministic", self.drop == 0)  # dropped pairs are drawn at random

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        """One value per pair, 0 for those that are left out."""
        differences = pairs.chosen_logratio - pairs.rejected_logratio
        if not len(differences):
            return differences
        detached = differences.detach()
        batch_std = detached.std() if len(detached) > 1 else torch.zeros_like(detached[0])
        running_mean = decay_towards(self.statistics.mean.to(detached), detached.mean())
        running_std = decay_towards(self.statistics.std.to(detached), batch_std)
        is_kept = self.draw_kept_pairs(detached, running_mean, running_std)
        mean = (detached * is_kept).sum() / is_kept.sum()
        beta = (self.beta * (1 + self.k * (mean - running_mean))).clamp(min=MIN_BETA)
        losses = -F.logsigmoid(pairs.subtract_margin(beta * differences))
        return losses * is_kept * (len(is_kept) / is_kept.sum())

    def draw_kept_pairs(
        self, differences: Float[Tensor, "p"], mean: Float[Tensor, ""], std: Float[Tensor, ""]
    ) -> Float[Tensor, "p"]:
        """1 for pairs that are kept and 0 for those that are left out."""
        if self.drop == 0 or len(differences) == 1:
            return torch.ones_like(differences)
        std = std.clamp(min=torch.finfo(differences.dtype).eps)
        log_weights = -0.5 * ((differences - mean) / std).square()
        # the largest sums of log-weight and Gumbel noise are a draw without replacement
        noise = -torch.empty_like(differences).exponential_().log()
        count = max(1, int(len(differences) * (1 - self.drop)))
        return torch.zeros_like(differences).scatter(0, (log_weights + noise).topk(count).indices, 1.0)

    def observe(self, pairs: PairLogProbs) -> None:
        self.statistics.add(pairs.chosen_logratio - pairs.rejected_logratio)

    def end_step(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        self.statistics.end_step(reduce)

    def discard_step(self) -> None:
        self.statistics.discard_step()
