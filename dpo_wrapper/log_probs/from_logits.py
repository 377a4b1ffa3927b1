"""Log-probs from logits that a model has already made: one pass over them, and no tensor of log-softmax."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpo_wrapper.log_probs.eager import accumulation_dtype
from dpo_wrapper.log_probs.tiles import spans

BLOCK_BYTES = 16 * 2**20
"""Memory of the rows that are worked on at once, in float32."""


class RowLogProbs(torch.autograd.Function):
    """The log-prob of `targets[k]` under row `rows[k]` of the logits; a row may be asked several times."""

    @staticmethod
    def forward(
        ctx: Any, logits: Float[Tensor, "n v"], rows: Int[Tensor, "t"], targets: Int[Tensor, "t"]
    ) -> Float[Tensor, "t"]:
        wide = accumulation_dtype(logits.dtype)
        asked, entry = rows.unique(return_inverse=True)
        lse = logits.new_empty(len(asked), dtype=wide)
        for part in blocks(logits, len(asked)):
            lse[part] = logits[asked[part]].to(wide).logsumexp(dim=-1)
        ctx.save_for_backward(logits, targets, asked, entry, lse)
        return (logits[rows, targets].to(wide) - lse[entry]).clamp(max=0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "log-probs from logits cannot be differentiated twice (create_graph = True): "
                "take logits.log_softmax(-1) instead."
            )
        logits, targets, asked, entry, lse = ctx.saved_tensors
        every = len(asked) == len(logits)
        grad_logits = torch.empty_like(logits) if every else torch.zeros_like(logits)
        of_row = torch.zeros_like(lse).index_add_(0, entry, grad)
        for part in blocks(logits, len(asked)):
            block = logits[asked[part]].to(lse.dtype)
            block = block.sub_(lse[part, None]).exp_().mul_(-of_row[part, None])
            here = ((entry >= part.start) & (entry < part.stop)).nonzero()[:, 0]
            block.index_put_((entry[here] - part.start, targets[here]), grad[here], accumulate=True)
            grad_logits[asked[part]] = block.to(logits.dtype)
        return grad_logits, None, None


def blocks(logits: Tensor, count: int) -> Any:
    row = logits.shape[-1] * accumulation_dtype(logits.dtype).itemsize
    return spans(count, BLOCK_BYTES // max(1, row))


@torch.no_grad()
def log_square_sums(logits: Float[Tensor, "n v"], rows: Int[Tensor, "t"]) -> Float[Tensor, "t"]:
    """`log Σ p²` over the vocabulary, of the distributions that these rows of the logits stand for."""
    wide = accumulation_dtype(logits.dtype)
    asked, entry = rows.unique(return_inverse=True)
    sums = logits.new_empty(len(asked), dtype=wide)
    for part in blocks(logits, len(asked)):
        sums[part] = logits[asked[part]].to(wide).log_softmax(dim=-1).mul_(2).logsumexp(dim=-1)
    return sums[entry]


def log_probs_of_rows(
    logits: Float[Tensor, "n v"],
    rows: Int[Tensor, "t"],
    targets: Int[Tensor, "t"],
    extras: Sequence[str] = (),
) -> Any:
    """In nats, in float32 or wider; with extras (of which there is `'log_sum_p2'` here) a tuple of that and a
    dict, as `token_log_probs` gives it."""
    log_probs = RowLogProbs.apply(logits, rows, targets)
    if not extras:
        return log_probs
    assert set(extras) == {"log_sum_p2"}, extras
    return log_probs, {"log_sum_p2": log_square_sums(logits, rows)}
