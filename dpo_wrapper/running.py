"""What a loss has to know of the steps before: the running mean and spread of `a - b`, for `BetaDPO`."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpo_wrapper.losses import RunningGap, updated

Reduce = Callable[[Tensor], Tensor]


class GapState(nn.Module):
    """Buffers that a checkpoint carries, and the sums of the step that is under way, which it does not.

    However a step is split, `end_step` moves the buffers once, by the mean and the standard deviation over
    all of its pairs.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("spread", torch.zeros(()))
        self.sums = [0.0, 0.0, 0.0]

    def now(self, like: Tensor) -> RunningGap:
        """As they were when the step began, in the dtype and on the device of a loss."""
        return RunningGap(self.mean.to(like), self.spread.to(like))

    @torch.no_grad()
    def see(self, gap: Float[Tensor, "p"]) -> None:
        """Take the pairs of one forward pass into the step's sums (of `gap - mean`, against rounding)."""
        shifted = gap.detach().double().cpu() - self.mean.double().cpu()
        new = (float(len(shifted)), shifted.sum().item(), shifted.square().sum().item())
        self.sums = [total + each for total, each in zip(self.sums, new, strict=True)]

    @torch.no_grad()
    def end_step(self, reduce: Reduce | None = None) -> None:
        """Move the buffers; `reduce` sums a tensor over processes. A step without pairs moves nothing."""
        sums = torch.tensor(self.sums, dtype=torch.float32 if reduce is not None else torch.float64)
        count, total, squares = (sums if reduce is None else reduce(sums)).tolist()
        self.sums = [0.0, 0.0, 0.0]
        if count == 0:
            return
        variance = max(0.0, squares - total * total / count) / max(1.0, count - 1)
        mean = self.mean + total / count
        moved = updated(RunningGap(self.mean, self.spread), mean, torch.full_like(mean, variance**0.5))
        self.mean.copy_(moved.mean)
        self.spread.copy_(moved.spread)
