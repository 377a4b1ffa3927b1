"""The gradients of log-probs, from tiles that were kept or are computed again."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpo_wrapper.cpu_matmul import add_matmul, matmul
from dpo_wrapper.log_probs.kept import Kept
from dpo_wrapper.log_probs.statistics import Statistics, summed
from dpo_wrapper.log_probs.tiles import Tiles


def gradients(
    tiles: Tiles,
    wants: Sequence[bool],
    grad: Float[Tensor, "t"],
    found: Statistics,
    kept: Kept,
    onto: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of hidden, weight and bias, for log-probs whose gradients are `grad`.

    `onto` are gradients of weight and bias, in the dtype of sums, that these are added to.
    """
    options, (wants_hidden, wants_weight, wants_bias) = tiles.options, wants
    hidden, weight, dtype = tiles.hidden, tiles.weight, options.dtype
    total, at_target = found.total, found.at_target
    (grad_weight, grad_bias), adds = onto, any(sums is not None for sums in onto)
    if not adds:
        grad_weight = torch.empty_like(weight) if wants_weight else None
        grad_bias = torch.empty_like(tiles.bias) if wants_bias and tiles.bias is not None else None
    grad_hidden = tiles.new(*hidden.shape) if wants_hidden else None
    by_grad = (hidden.to(options.wide) * -grad[:, None]).to(dtype) if wants_weight else None
    for words in tiles.words:
        straight = adds or (weight.dtype == dtype and len(tiles.rows) == 1)
        room = grad_weight[words] if straight and grad_weight is not None else None
        of_weight = room if adds else None
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
                add_matmul(grad_hidden[rows], narrow, weight[words].to(dtype))
            if by_grad is not None and of_weight is None:
                of_weight = matmul(narrow.T, by_grad[rows], room)
            elif by_grad is not None and of_weight is not None:
                of_weight = of_weight.to(options.wide)
                add_matmul(of_weight, narrow.T, by_grad[rows])
            if grad_bias is not None:
                of_bias.sub_(grad[rows] @ block.to(options.wide))
            del known, block, narrow  # before the next is made
        if grad_weight is not None and of_weight is None:
            grad_weight[words] = 0.0
        elif grad_weight is not None and of_weight is not None and of_weight is not room:
            grad_weight[words] = of_weight
        if grad_bias is not None:
            grad_bias[words] = of_bias.add_(grad_bias[words]) if adds else of_bias
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
