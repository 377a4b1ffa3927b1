"""Gradients in forward, for log-probs of which it is known what loss they will be made into.

A trained head needs softmaxes a second time, weighed by the loss's gradient; to have them, one keeps them
all or computes them again. Where the loss is known, each group of tokens that meet in it can be finished
before the next one begins, and only its own softmaxes are there: 3 products, and the memory of a part.

What comes back in backward is compared with what was foretold. If it is a multiple of that (a share of a
step, a scaler's factor), the gradients are; if not, they are computed again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dpo_wrapper.log_probs.backward import gradients
from dpo_wrapper.log_probs.kept import Kept
from dpo_wrapper.log_probs.statistics import Statistics
from dpo_wrapper.log_probs.tiled import gradients_of, refuse_twice, sweep
from dpo_wrapper.log_probs.tiles import Options, Tiles


@dataclass(frozen=True)
class FusedLoss:
    """What log-probs will be made into.

    Args:
        fn: from Float[t], log-probs as `token_log_probs` returns them, to Float[]. It is called several
            times, with -1 for log-probs that are not known yet, and should give the same each time.
        groups: Int[t], a number for each log-prob: what the loss does with one group does not depend on the
            others, as with the tokens of one preference pair. Without it all are one group.
    """

    fn: Callable[[Tensor], Tensor]
    groups: Int[Tensor, "t"] | None = None

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"the loss of FusedLoss should be a function, but it is {self.fn!r}.")
        if self.groups is not None and (self.groups.ndim != 1 or self.groups.dtype != torch.int64):
            raise TypeError(
                "the groups of FusedLoss should be an int64 tensor, one number for each log-prob."
            )

    def parts(self, t: int, most: int) -> list[Any]:
        """Which tokens are finished at once: whole groups, of at most `most` tokens if no group has more."""
        everything = [slice(None)]
        if self.groups is None or t <= most:
            return everything
        _, group, sizes = torch.unique(self.groups, return_inverse=True, return_counts=True)
        part_of, part, filled = [], 0, 0
        for size in sizes.tolist():
            if filled and filled + size > most:
                part, filled = part + 1, 0
            part_of.append(part)
            filled += size
        parts = torch.tensor(part_of, device=group.device)[group]
        rows = parts.argsort(stable=True).split(torch.bincount(parts).tolist())
        return list(rows) if len(rows) > 1 else everything

    def gradient(self, log_probs: Float[Tensor, "t"]) -> Float[Tensor, "t"]:
        """Of the loss, for the log-probs."""
        plainly = saved_tensors_hooks(lambda x: x, lambda x: x)  # nothing runs again, as in a checkpoint
        with torch.enable_grad(), plainly:
            leaf = log_probs.detach().clone().requires_grad_()
            loss = self.fn(leaf)
            if not (isinstance(loss, Tensor) and loss.ndim == 0):
                raise ValueError("the loss of FusedLoss should return a tensor without dimensions.")
            if not loss.requires_grad:
                return torch.zeros_like(leaf)
            (grad,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        return torch.zeros_like(leaf) if grad is None else grad


def factor(grad: Float[Tensor, "t"], foretold: Float[Tensor, "t"]) -> float | None:
    """What the one is the other times, but for rounding; None if it is no multiple."""
    at = foretold.abs().argmax()
    scale = (grad[at] / foretold[at]).where(foretold[at] != 0, 1.0)
    eps = torch.finfo(grad.dtype).eps
    allowed = 64 * eps * grad.abs() + 8 * eps * grad[at].abs()
    return float(scale) if ((grad - scale * foretold).abs() <= allowed).all() else None


def split_for_fused_loss(
    fused_loss: FusedLoss | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: Options,
) -> list[Any] | None:
    """The parts whose gradients are made in forward; None if nothing is gained by it, or something lost.

    A frozen head has its gradients in forward without a loss. float16 needs a scaler's factor from the start.
    To add up parts, a gradient is wanted in the dtype of sums. Processes that share a vocabulary do not agree
    on parts.
    """
    trained = [x for x in (weight, bias) if x is not None and x.requires_grad]
    if fused_loss is None or not trained or not len(targets) or not options.differentiates:
        return None
    if options.extras or options.group is not None:
        return None
    dtypes = {options.dtype, hidden.dtype, *(x.dtype for x in trained)}
    parts = fused_loss.parts(len(targets), options.part_rows)
    narrow = any(x.dtype != options.wide for x in trained)
    return None if torch.float16 in dtypes or (narrow and len(parts) > 1) else parts


def memory_of(parts: list[Any], tiles: Tiles) -> Tensor | None:
    """Memory on the CPU for the softmaxes of every part in turn, but for groups that are a part too large."""
    options, words = tiles.options, len(tiles.weight)
    if len(parts) == 1 or tiles.hidden.device.type != "cpu":
        return None
    rows = min(options.part_rows, max(map(len, parts)))
    return torch.empty(rows * words, dtype=options.dtype)


class FusedLossLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: Options,
        fused_loss: FusedLoss,
        parts: list[Any],
    ) -> Tensor:
        whole, wants = Tiles(hidden, weight, bias, targets, options), ctx.needs_input_grad[:3]
        statistics = Statistics.of_nothing(whole.new(len(targets)))
        log_probs, foretold = statistics.log_probs.fill_(-1.0), whole.new(len(targets))
        of_hidden = torch.empty_like(hidden) if wants[0] else None
        of_weight: Tensor | None = None
        of_bias: Tensor | None = None
        room = max(options.keep_bytes, options.part_rows * len(weight) * options.dtype.itemsize)
        memory = memory_of(parts, whole)
        for rows in parts:
            tiles = whole.part(rows)
            numbers = len(tiles.targets) * len(weight)
            fits = memory is not None and len(memory) >= numbers
            kept = Kept(room, numbers, hidden.device, options.dtype, memory if fits else None)
            with torch.autocast(hidden.device.type, enabled=False):
                found = sweep(tiles, kept)
            for of_all, of_part in zip(statistics, found, strict=True):
                of_all[rows] = of_part
            log_probs[rows] = found.log_probs
            foretold[rows] = fused_loss.gradient(log_probs)[rows]  # under autocast, as the loss will be
            with torch.autocast(hidden.device.type, enabled=False):
                new, of_weight, of_bias = gradients(
                    tiles, wants, foretold[rows], found, kept, (of_weight, of_bias)
                )
            if of_hidden is not None and new is not None:
                of_hidden[rows] = new
            whole.scratch = tiles.scratch
        ctx.options, ctx.made = options, (of_hidden, of_weight, of_bias)
        ctx.save_for_backward(hidden, weight, bias, targets, *statistics, foretold)
        return log_probs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice()
        *saved, foretold = ctx.saved_tensors
        made, ctx.made = ctx.made, None  # given away, so that nobody need copy them
        scale = None if made is None else factor(grad, foretold)
        if scale is None:
            del made
            nothing = Kept(0, 0, grad.device, ctx.options.dtype)
            return *gradients_of(ctx, saved, grad, nothing), None, None, None, None
        for each in made:
            if each is not None and scale != 1.0:
                each.mul_(scale)
        return *made, None, None, None, None
