"""Losses that compare the pairs of a batch with one another.

The batch is what one call has: where an optimizer step is computed in parts (micro-batches, or shares of
several processes), each part is sorted, or averaged, by itself, and the step is not what it would be in one.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dpo_wrapper.losses.base import Loss, PairLogProbs, RunningGap, not_negative, option, pull, smoothing
from dpo_wrapper.losses.pairwise import smoothed

MOMENTUM = 0.9
"""How much of a running mean is kept at each step."""
SMALLEST_BETA = 1e-3


@dataclass(frozen=True)
class AOT(Loss):
    """`-(1 - ε) log σ(βd) - ε log σ(-βd)` with `d = sort(p_w - p_l) - sort(r_w - r_l)` over the batch.

    Value k belongs to the k-th smallest differences, not to pair k. Sorted are the pairs of one forward pass.

    Paper: Melnyk 2024 (arXiv 2406.05882)
    For: preferring chosen as a whole distribution; large batches
    """

    per_pair: ClassVar[bool] = False

    beta: float = pull()
    label_smoothing: float = smoothing()

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        gap = (pairs.chosen - pairs.rejected).sort().values
        if pairs.ref_chosen is not None and pairs.ref_rejected is not None:
            gap = gap - (pairs.ref_chosen - pairs.ref_rejected).sort().values
        return smoothed(self.beta * gap, self.label_smoothing)


@dataclass(frozen=True)
class AOTUnpaired(Loss):
    """`-(1 - ε) log σ(βd) - ε log σ(-βd)` with `d = sort(a) - sort(b)` over the batch.

    Value k belongs to the k-th smallest log-ratios, not to pair k. Sorted are the pairs of one forward pass.

    Paper: Melnyk 2024 (arXiv 2406.05882)
    For: the same where the two sides answer different prompts
    """

    per_pair: ClassVar[bool] = False

    beta: float = pull()
    label_smoothing: float = smoothing()

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        gap = pairs.chosen_logratio.sort().values - pairs.rejected_logratio.sort().values
        return smoothed(self.beta * gap, self.label_smoothing)


@dataclass(frozen=True)
class BetaDPO(Loss):
    """`-log σ(β'A)` with `A = a - b, β' = max(β(1 + k(mean(A) - M)), 0.001)`.

    `M` is the running mean of A over the steps, this batch included (0.9 of it stays at each step; it starts
    at 0, where a policy begins); `DPO` keeps it. `mean(A)` is over the pairs of one forward pass, and β' has
    no gradient. With `drop` > 0, that part of the pairs is left out at random, unlikely ones first: a pair's
    weight is the density at A of a normal distribution with mean M and the running standard deviation.

    Paper: Wu 2024 (arXiv 2407.08639), eq. 10, and its code
    For: data whose pairs are now close, now far apart
    """

    takes_margin: ClassVar[bool] = True
    per_pair: ClassVar[bool] = False
    needs_gap: ClassVar[bool] = True

    beta: float = pull()
    k: float = not_negative(0.6, "how much β follows the gap of the batch")
    drop: float = option(
        0.0, "part of the pairs left out, in [0, 1)", "be in [0, 1)", lambda value: 0 <= value < 1
    )

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        gap = pairs.chosen_logratio - pairs.rejected_logratio
        if not len(gap):
            return gap
        fixed = gap.detach()
        spread = fixed.std() if len(fixed) > 1 else torch.zeros_like(fixed[0])
        running = updated(pairs.gap, fixed.mean(), spread)
        kept = self.kept(fixed, running)
        mean = (fixed * kept).sum() / kept.sum()
        beta = (self.beta * (1 + self.k * (mean - running.mean))).clamp(min=SMALLEST_BETA)
        return -F.logsigmoid(pairs.less_margin(beta * gap)) * kept * (len(kept) / kept.sum())

    def pure(self) -> bool:
        return self.drop == 0  # else it draws

    def kept(self, gap: Float[Tensor, "p"], running: RunningGap) -> Float[Tensor, "p"]:
        """1 for pairs that stay and 0 for others."""
        if self.drop == 0 or len(gap) == 1:
            return torch.ones_like(gap)
        spread = running.spread.clamp(min=torch.finfo(gap.dtype).eps)
        log_weight = -0.5 * ((gap - running.mean) / spread).square()
        noise = -torch.empty_like(gap).exponential_().log()  # the largest of weight + Gumbel noise are a draw
        most = max(1, int(len(gap) * (1 - self.drop)))  # without replacement, of whatever small weights
        return torch.zeros_like(gap).scatter(0, (log_weight + noise).topk(most).indices, 1.0)


def updated(before: RunningGap | None, mean: Float[Tensor, ""], spread: Float[Tensor, ""]) -> RunningGap:
    """The running mean and standard deviation of `a - b` after a step with these, 0 before the first."""
    mean, spread = (1 - MOMENTUM) * mean, (1 - MOMENTUM) * spread
    if before is None:
        return RunningGap(mean, spread)
    return RunningGap(mean + MOMENTUM * before.mean, spread + MOMENTUM * before.spread)
