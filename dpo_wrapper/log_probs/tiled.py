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
    weight, with its loss known   forward 3, backward 0: see `ahead`

Bytes beside inputs and gradients: a tile (two with extras), `[t, d]` in float32, one number per token and row
of tiles; the kept softmaxes. Each weight gradient is finished over all tokens before the next begins, in
float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_wrapper.log_probs.backward import gradients
from dpo_wrapper.log_probs.kept import Kept
from dpo_wrapper.log_probs.statistics import Statistics, summed
from dpo_wrapper.log_probs.tiles import Options, Tiles
from dpo_wrapper.log_probs.weighed import Weighed


def sweep(tiles: Tiles, kept: Kept, weighed: Weighed | None = None) -> Statistics:
    """Every tile once: statistics of all, softmaxes kept as far as there is room, or weighed."""
    statistics = Statistics.of_nothing(tiles.new(len(tiles.targets)))
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
                write=weighed is not None or keeps,
                moments=tiles.options.extras,
            )
            statistics.add(rows, folded)
            if weighed is not None:
                weighed.add(rows, words, folded)
            if keeps:
                kept.add(folded.block, folded.lse, slot)
            del folded, slot  # before the next is made
    return statistics if tiles.options.group is None else statistics.over(tiles.options.group)


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
        weighed = Weighed(tiles) if ctx.ready else None
        statistics = sweep(tiles, kept, weighed)
        of_hidden = None
        if weighed is not None:
            of_hidden = weighed.against(statistics.total).neg_()
            local = tiles.local(slice(None), slice(0, len(weight)))
            here = (local >= 0).nonzero()[:, 0]  # another process may have the target
            of_target = weight[local[here]].to(of_hidden.dtype)
            of_hidden[here] += of_target * statistics.at_target[here, None]

        ctx.options, ctx.kept = options, kept
        saved = [hidden, weight, bias, targets, *statistics]
        ctx.save_for_backward(*([of_hidden] if ctx.ready else saved))
        ctx.hidden_dtype = hidden.dtype
        log_probs = statistics.log_probs
        extras = statistics.extras() if options.extras else ()
        ctx.mark_non_differentiable(*extras)
        return (log_probs, *extras)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice()
        if ctx.ready:
            (ready,) = ctx.saved_tensors
            grad_hidden = summed(ready * grad[:, None], ctx.options.group)
            return grad_hidden.to(ctx.hidden_dtype), None, None, None, None
        return *gradients_of(ctx, ctx.saved_tensors, grad, ctx.kept), None, None


def refuse_twice() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "tiled log-probs cannot be differentiated twice (create_graph = True): use impl = 'eager'."
        )


def gradients_of(
    ctx: Any, saved: Sequence[Tensor], grad: Tensor, kept: Kept
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in backward, from what forward saved."""
    hidden, weight, bias, targets, *found = saved
    with torch.autocast(hidden.device.type, enabled=False):
        tiles = Tiles(hidden, weight, bias, targets, ctx.options)
        return gradients(tiles, ctx.needs_input_grad[:3], grad, Statistics(*found), kept)
