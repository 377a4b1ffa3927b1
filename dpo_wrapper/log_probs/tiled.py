"""Log-probs of scored tokens without their logits: the algorithm, for whatever computes a tile of logits.

Logits exist a tile at a time, `[r, w]` of r tokens and w words of the vocabulary. Of each tile a *fold* takes
the log-sum-exp over the words that are no target (so that a log-prob is `log σ(x_target - lse_others)`, at
most 0 and exact near 0) and, in place, its gradient: the softmax within the tile. Tiles are then weighed
against one another by their log-sum-exps, as in online softmax (Milakov and Gimelshein 2018).

FLOPs, in products of [t, d] and [d, v] (2·t·d·v each):

    no gradient wanted            forward 1
    hidden alone (frozen head)    forward 2, backward 0: the gradient of each log-prob for its hidden state is
                                  ready in forward, and backward scales it
    weight (trained head)         forward 1, backward 2 + f: softmaxes of the first tiles are kept, as many as
                                  there is room for, and a part f of all tiles is computed again

Bytes beside inputs and gradients: a tile (two with extras), `[t, d]` in float32, one number per token and row
of tiles; the kept softmaxes. Each weight gradient is finished over all tokens before the next begins, in
float32.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from dpo_wrapper.log_probs.eager import accumulation_dtype
from dpo_wrapper.log_probs.kept import Kept
from dpo_wrapper.log_probs.statistics import Folded, Statistics, summed
from dpo_wrapper.products import add_product, product

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
        self.scratch: Tensor | None = None

    def fold(
        self, rows: slice, words: slice, *, out: Tensor | None = None, stays: bool = False, **kwargs: Any
    ) -> Folded:
        """A tile, in `out` or, unless it `stays`, where the next one will be."""
        options = self.options
        if out is not None and out.dtype != options.wide:
            out = None  # computed wide, and narrowed when it is kept
        a, b = self.hidden[rows].to(options.dtype), self.weight[words].to(options.dtype).T
        block = product(a, b, None if stays else self.room(len(a), b.shape[1]))
        local = self.local(rows, words)
        bias = None if self.bias is None else self.bias[words]
        return options.fold(block, local, bias, options.logit_scale, options.softcap, out=out, **kwargs)

    def room(self, rows: int, words: int) -> Float[Tensor, "r w"]:
        """The same memory each time."""
        if self.scratch is None or len(self.scratch) < rows * words:
            self.scratch = self.hidden.new_empty(rows * words, dtype=self.options.dtype)
        return self.scratch[: rows * words].view(rows, words)

    def local(self, rows: slice, words: slice) -> Int[Tensor, "r"]:
        """Each target's column in a tile, or -1."""
        local = self.targets[rows] - (self.options.offset + words.start)
        return local.where((local >= 0) & (local < words.stop - words.start), -1)

    def new(self, *shape: int) -> Tensor:
        return self.hidden.new_zeros(shape, dtype=self.options.wide)


REACH = 5.0
"""A tile's weight may be e^5 times that of the anchor, which float16 can still hold."""


class Weighed:
    """The gradient of log-sum-exps for hidden states, summed over tiles by their weights against an anchor.

    The anchor is a log-sum-exp of each token; it moves, and what has been summed is weighed anew, only where
    a tile is far above it, which is seldom after the first.
    """

    def __init__(self, tiles: Tiles) -> None:
        self.tiles = tiles
        self.sum = tiles.new(*tiles.hidden.shape)
        self.anchor = tiles.new(len(tiles.hidden)).fill_(-torch.inf)

    def add(self, rows: slice, words: slice, folded: Folded) -> None:
        """Takes the tile in, and uses it up."""
        anchor, dtype = self.anchor[rows], self.tiles.options.dtype
        above = folded.lse > anchor + REACH
        if anchor.device.type != "cpu" or above.any():  # on an accelerator asking takes longer than doing
            moved = folded.lse.where(above, anchor)
            self.sum[rows].mul_(ratio(anchor, moved)[:, None])
            anchor.copy_(moved)
        block = folded.block.mul_(ratio(folded.lse, anchor).to(folded.block.dtype)[:, None])
        add_product(self.sum[rows], block.to(dtype), self.tiles.weight[words].to(dtype))

    def against(self, total: Float[Tensor, "t"]) -> Float[Tensor, "t d"]:
        """The sum, weighed against the whole."""
        return self.sum.mul_(ratio(self.anchor, total)[:, None])


def ratio(lse: Tensor, other: Tensor) -> Tensor:
    """`e^(lse - other)`, 0 for nothing over nothing."""
    return (lse - other).exp().masked_fill(lse == -torch.inf, 0.0)


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
        room = options.keep_bytes if wants_weight or wants_bias else 0
        kept = Kept(room, len(targets) * len(weight), hidden.device, options.dtype)

        statistics = Statistics.of_nothing(tiles.new(len(targets)))
        ready = Weighed(tiles) if ctx.ready else None
        for words in tiles.words:
            for rows in tiles.rows:
                size = (rows.stop - rows.start, words.stop - words.start)
                keeps = kept.takes(size[0] * size[1])
                slot = kept.slot(*size) if keeps else None
                folded = tiles.fold(
                    rows,
                    words,
                    out=slot,
                    stays=keeps and slot is None,
                    write=ctx.ready or keeps,
                    moments=options.extras,
                )
                statistics.add(rows, folded)
                if ready is not None:
                    ready.add(rows, words, folded)
                if keeps:
                    kept.add(folded.block, folded.lse, slot)
                del folded, slot  # before the next is made
        if options.group is not None:
            statistics = statistics.over(options.group)
        of_hidden = None
        if ready is not None:
            total = statistics.total
            of_hidden = ready.against(total).neg_()
            local = tiles.local(slice(None), slice(0, len(weight)))
            here = (local >= 0).nonzero()[:, 0]  # another process may have the target
            at_target = (statistics.lse - total).exp() * statistics.slope
            of_hidden[here] += weight[local[here]].to(of_hidden.dtype) * at_target[here, None]

        ctx.options, ctx.kept = options, kept
        saved = [hidden, weight, bias, targets, statistics.own, statistics.lse, statistics.slope]
        ctx.save_for_backward(*([of_hidden] if ctx.ready else saved))
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
        hidden, weight, bias, targets, own, lse, slope = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            tiles = Tiles(hidden, weight, bias, targets, ctx.options)
            total = torch.logaddexp(lse, own)
            others = (lse - total).exp()
            wants = ctx.needs_input_grad[:3]
            return *gradients(tiles, wants, grad, total, others * slope, ctx.kept), None, None


def gradients(
    tiles: Tiles,
    wants: tuple[bool, ...],
    grad: Float[Tensor, "t"],
    total: Float[Tensor, "t"],
    at_target: Float[Tensor, "t"],
    kept: Kept,
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
    for words in tiles.words:
        of_weight: Tensor | None = None
        straight = weight.dtype == dtype and len(tiles.rows) == 1
        room = grad_weight[words] if straight and grad_weight is not None else None
        of_bias = tiles.new(words.stop - words.start)
        for rows in tiles.rows:
            known = kept.next()
            if known is not None:
                local = tiles.local(rows, words)
                block = against(*known, total[rows], at_target[rows], local, out=known[0])
            else:
                block = tiles.fold(rows, words, total=total[rows], at_target=at_target[rows]).block
            narrow = block.to(dtype)
            if grad_hidden is not None:
                add_product(grad_hidden[rows], narrow, weight[words].to(dtype))
            if by_grad is not None:
                of_rows = product(narrow.T, by_grad[rows], room)
                of_weight = of_rows if of_weight is None else of_weight.to(options.wide).add_(of_rows)
            if grad_bias is not None:
                of_bias.sub_(grad[rows] @ block.to(options.wide))
            del known, block, narrow  # before the next is made
        if grad_weight is not None and of_weight is None:
            grad_weight[words] = 0.0
        elif grad_weight is not None and of_weight is not None and of_weight is not room:
            grad_weight[words] = of_weight
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
