"""Log-probs of scored tokens without their logits: the algorithm, for whatever computes a tile of logits.

Logits exist a tile at a time, `[r, w]` of r tokens and w words of the vocabulary. Of each tile a *fold* takes
the log-sum-exp over the words that are no target (so that a log-prob is `log σ(x_target - lse_others)`, at
most 0 and exact near 0) and, in place, its gradient: the softmax within the tile. Tiles are then weighed
against one another by their log-sum-exps, as in online softmax (Milakov and Gimelshein 2018).

FLOPs, in products of [t, d] and [d, v] (2·t·d·v each):

    no gradient wanted            forward 1
    hidden alone (frozen head)    forward 2, backward 0: the gradient of each log-prob for its hidden state is
                                  ready in forward, and backward scales it
    weight, tiles fit KEEP        forward 1, backward 2: the softmaxes of all tiles are kept
    weight, they do not           forward 1, backward 3: tiles are computed again

Bytes beside inputs and gradients: two tiles, `[t, d]` in float32, one number per token and row of tiles; the
kept softmaxes. Each weight gradient is finished over all tokens before the next begins, in float32.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from dpo_wrapper.log_probs.eager import accumulation_dtype
from dpo_wrapper.log_probs.statistics import Folded, Statistics, summed
from dpo_wrapper.products import product

ROWS = 8192
"""Tokens in a tile."""

Fold = Callable[..., Folded]


@dataclass(frozen=True)
class Options:
    """How a head makes logits of hidden states, and how much memory that may take."""

    logit_scale: float
    softcap: float | None
    dtype: torch.dtype
    """Of the matrix products."""
    fold: Fold
    tile_bytes: int
    keep_bytes: int
    differentiates: bool = True
    """Whether gradients may be asked for: a Function cannot tell by itself."""
    extras: bool = False
    group: ProcessGroup | None = None
    """The processes that hold a part of the vocabulary each, in the order of their ranks."""
    offset: int = 0
    """The first word of this process's part."""

    @property
    def wide(self) -> torch.dtype:
        return accumulation_dtype(self.dtype)


def spans(n: int, most: int, multiple: int = 1) -> Iterator[slice]:
    """0 to n in stretches as even as may be, of at most `most`."""
    size = -(-n // max(1, -(-n // max(1, most))))
    size = max(1, -(-size // multiple) * multiple)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


class Tiles:
    """The tiles of t tokens and v words: words outside, tokens inside."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options
    ) -> None:
        self.hidden, self.weight, self.bias, self.targets = hidden, weight, bias, targets
        self.options = options
        t, v = len(targets), len(weight)
        per_value = options.wide.itemsize + (options.dtype.itemsize if options.dtype != options.wide else 0)
        self.rows = list(spans(t, ROWS))
        words = options.tile_bytes // (per_value * max(1, min(t, ROWS)))
        self.words = list(spans(v, words, 64 if words >= 64 else 1))
        self.bytes = t * v * options.dtype.itemsize

    def fold(self, rows: slice, words: slice, **kwargs: Any) -> Folded:
        options = self.options
        block = product(self.hidden[rows].to(options.dtype), self.weight[words].to(options.dtype).T)
        local = self.local(rows, words)
        bias = None if self.bias is None else self.bias[words]
        return options.fold(block, local, bias, options.logit_scale, options.softcap, **kwargs)

    def local(self, rows: slice, words: slice) -> Int[Tensor, "r"]:
        """Each target's column in a tile, or -1."""
        local = self.targets[rows] - (self.options.offset + words.start)
        return local.where((local >= 0) & (local < words.stop - words.start), -1)

    def new(self, *shape: int) -> Tensor:
        return self.hidden.new_zeros(shape, dtype=self.options.wide)


class TiledLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options
    ) -> tuple[Tensor, ...]:
        tiles = Tiles(hidden, weight, bias, targets, options)
        wants_hidden, wants_weight, wants_bias = (
            wanted and options.differentiates for wanted in ctx.needs_input_grad[:3]
        )
        ctx.ready = wants_hidden and not (wants_weight or wants_bias)
        keeps = (wants_weight or wants_bias) and tiles.bytes <= options.keep_bytes

        statistics, kept = Statistics.of_nothing(tiles.new(len(targets))), []
        ready = tiles.new(*hidden.shape) if ctx.ready else None
        for words in tiles.words:
            for rows in tiles.rows:
                folded = tiles.fold(rows, words, write=ctx.ready or keeps, moments=options.extras)
                before, now = statistics.add(rows, folded)
                if ready is not None:
                    of_tile = product(folded.block.to(options.dtype), weight[words].to(options.dtype))
                    ready[rows].mul_(before[:, None]).addcmul_(of_tile.to(ready.dtype), now[:, None])
                if keeps:
                    kept += [folded.block.to(options.dtype), folded.lse]
                del folded  # before the next is made
        mine = statistics
        if options.group is not None:
            statistics = statistics.over(options.group)
        if ready is not None:
            total = statistics.total
            ready.mul_((mine.lse - total).exp()[:, None])
            local = tiles.local(slice(None), slice(0, len(weight)))
            here = (local >= 0).nonzero()[:, 0]  # another process may have the target
            at_target = (statistics.lse - total).exp() * statistics.slope
            ready.neg_()
            ready[here] += weight[local[here]].to(ready.dtype) * at_target[here, None]

        ctx.options = options
        saved = [hidden, weight, bias, targets, statistics.own, statistics.lse]
        ctx.save_for_backward(*([ready] if ctx.ready else [*saved, statistics.slope, *kept]))
        ctx.hidden_dtype = hidden.dtype
        log_probs = statistics.log_probs
        extras = statistics.extras() if options.extras else ()
        ctx.mark_non_differentiable(*extras)
        return (log_probs, *extras)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "tiled log-probs cannot be differentiated twice (create_graph = True): use impl = 'eager'."
            )
        if ctx.ready:
            (ready,) = ctx.saved_tensors
            grad_hidden = summed(ready * grad[:, None], ctx.options.group)
            return grad_hidden.to(ctx.hidden_dtype), None, None, None, None
        hidden, weight, bias, targets, own, lse, slope, *kept = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            tiles = Tiles(hidden, weight, bias, targets, ctx.options)
            total = torch.logaddexp(lse, own)
            others = (lse - total).exp()
            wants = ctx.needs_input_grad[:3]
            return *gradients(tiles, wants, grad, total, others * slope, kept), None, None


def gradients(
    tiles: Tiles,
    wants: tuple[bool, ...],
    grad: Float[Tensor, "t"],
    total: Float[Tensor, "t"],
    at_target: Float[Tensor, "t"],
    kept: list[Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of hidden, weight and bias, for log-probs whose gradients are `grad`.

    `at_target` is d log-prob / d (hidden @ weightᵀ) at the target, as exact as it can be told.
    """
    options, (wants_hidden, wants_weight, wants_bias) = tiles.options, wants
    hidden, weight, dtype = tiles.hidden, tiles.weight, options.dtype
    grad_hidden = tiles.new(*hidden.shape) if wants_hidden else None
    grad_weight = torch.empty_like(weight) if wants_weight else None
    grad_bias = torch.empty_like(tiles.bias) if wants_bias and tiles.bias is not None else None
    by_grad = (hidden.to(options.wide) * -grad[:, None]).to(dtype) if wants_weight else None
    parts = iter(kept)
    for words in tiles.words:
        of_weight: Tensor | None = None
        of_bias = tiles.new(words.stop - words.start)
        for rows in tiles.rows:
            if kept:
                local = tiles.local(rows, words)
                block = against(next(parts), next(parts), total[rows], at_target[rows], local)
            else:
                block = tiles.fold(rows, words, total=total[rows], at_target=at_target[rows]).block
            narrow = block.to(dtype)
            if grad_hidden is not None:
                grad_hidden[rows] += product(narrow, weight[words].to(dtype))
            if by_grad is not None:
                of_rows = product(narrow.T, by_grad[rows])
                of_weight = of_rows if of_weight is None else of_weight.to(options.wide).add_(of_rows)
            if grad_bias is not None:
                of_bias.sub_(grad[rows] @ block.to(options.wide))
            del block, narrow  # before the next is made
        if grad_weight is not None:
            grad_weight[words] = 0.0 if of_weight is None else of_weight
        if grad_bias is not None:
            grad_bias[words] = of_bias.to(grad_bias.dtype)
    if grad_hidden is not None:
        grad_hidden = summed(grad_hidden.mul_(-grad[:, None]), options.group).to(hidden.dtype)
    return grad_hidden, grad_weight, grad_bias


def against(
    block: Float[Tensor, "r w"],
    lse: Float[Tensor, "r"],
    total: Float[Tensor, "r"],
    at_target: Float[Tensor, "r"],
    local: Int[Tensor, "r"],
    out: Float[Tensor, "r w"] | None = None,
) -> Float[Tensor, "r w"]:
    """The tile's own softmax as a part of the whole one, less the target: minus d log-prob / d logits."""
    out = torch.mul(block, (lse - total).exp().to(block.dtype)[:, None], out=out)
    rows = (local >= 0).nonzero()[:, 0]
    out[rows, local[rows]] = -at_target[rows].to(out.dtype)
    return out
