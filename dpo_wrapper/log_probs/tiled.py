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
        self.rooms: dict[str, Tensor] = {}

    def fold(
        self, rows: slice, words: slice, *, out: Tensor | None = None, stays: bool = False, **kwargs: Any
    ) -> Folded:
        """A tile, in `out` or, unless it `stays`, where the next one will be."""
        options = self.options
        if out is not None and out.dtype != options.wide:
            out = None  # computed wide, and narrowed when it is kept
        a, b = self.hidden[rows].to(options.dtype), self.weight[words].to(options.dtype).T
        block = product(a, b, None if stays else self.room("tile", len(a), b.shape[1]))
        local = self.local(rows, words)
        bias = None if self.bias is None else self.bias[words]
        return options.fold(block, local, bias, options.logit_scale, options.softcap, out=out, **kwargs)

    def of_hidden(self, words: slice, block: Float[Tensor, "r w"]) -> Float[Tensor, "r d"]:
        """What a tile of gradients is for hidden states, where the next one will be."""
        room = self.room("hidden", len(block), self.hidden.shape[1])
        return product(block, self.weight[words].to(self.options.dtype), room).to(self.options.wide)

    def room(self, name: str, rows: int, columns: int) -> Float[Tensor, "r c"]:
        """The same memory each time."""
        size = rows * columns
        if name not in self.rooms or len(self.rooms[name]) < size:
            self.rooms[name] = self.hidden.new_empty(size, dtype=self.options.dtype)
        return self.rooms[name][:size].view(rows, columns)

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
        room = options.keep_bytes if wants_weight or wants_bias else 0
        kept = Kept(room, len(targets) * len(weight), hidden.device, options.dtype)

        statistics = Statistics.of_nothing(tiles.new(len(targets)))
        ready = tiles.new(*hidden.shape) if ctx.ready else None
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
                before, now = statistics.add(rows, folded)
                if ready is not None:
                    of_tile = tiles.of_hidden(words, folded.block.to(options.dtype))
                    ready[rows].mul_(before[:, None]).addcmul_(of_tile, now[:, None])
                if keeps:
                    kept.add(folded.block, folded.lse, slot)
                del folded, slot  # before the next is made
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

        ctx.options, ctx.kept = options, kept
        saved = [hidden, weight, bias, targets, statistics.own, statistics.lse, statistics.slope]
        ctx.save_for_backward(*([ready] if ctx.ready else saved))
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
                grad_hidden[rows] += tiles.of_hidden(words, narrow)
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
