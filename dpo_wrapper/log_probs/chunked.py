"""Log-probs of scored tokens in bounded memory, on any device.

The tokens are taken in chunks small enough that one `[chunk, v]` block of float32 logits (and what is worked
out in place from it) fits a budget. Forward keeps one number per token, the log-sum-exp; backward computes
each block again:

    forward    2·t·d·v  FLOPs      block -> max, log-sum-exp, the target's logit
    backward   2·t·d·v             block again -> probabilities -> d loss / d logits, all in place
             + 2·t·d·v             d hidden, if wanted
             + 2·t·d·v             d weight, if wanted, accumulated in float32
"""

from collections.abc import Iterator
from typing import Any

import torch
from beartype import beartype
from jaxtyping import Float, Int, jaxtyped
from torch import Tensor

from dpo_wrapper.log_probs.eager import accumulation_dtype, compute_dtype
from dpo_wrapper.products import product

BLOCK_BYTES = 16 * 2**20
"""Memory that one block of logits and its temporaries may take; at least one token is always done."""


class Head:
    """`logits = softcap_(logit_scale · (hidden @ weightᵀ + bias))`, and its derivative, by blocks."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float | None,
        dtype: torch.dtype,
    ) -> None:
        self.weight, self.bias = weight.to(dtype), bias
        self.logit_scale, self.softcap, self.dtype = logit_scale, softcap, dtype
        self.wide = accumulation_dtype(dtype)

    def blocks(self, t: int) -> Iterator[slice]:
        """Slices of the token axis, as even as the budget allows."""
        per_value = self.wide.itemsize + (self.dtype.itemsize if self.dtype != self.wide else 0)
        if self.softcap is not None:
            per_value += self.wide.itemsize
        most = max(1, BLOCK_BYTES // max(1, self.weight.shape[0] * per_value))
        size = -(-t // max(1, -(-t // most)))
        return (slice(start, min(start + size, t)) for start in range(0, t, max(size, 1)))

    def logits(self, hidden: Float[Tensor, "c d"]) -> Float[Tensor, "c v"]:
        block = product(hidden.to(self.dtype), self.weight.T).to(self.wide)
        if self.bias is not None:
            block += self.bias
        if self.logit_scale != 1.0:
            block *= self.logit_scale
        if self.softcap is not None:
            block.div_(self.softcap).tanh_().mul_(self.softcap)
        return block

    def derivative(self, logits: Float[Tensor, "c v"]) -> Tensor | float:
        """d logits / d (hidden @ weightᵀ + bias), from the logits themselves."""
        if self.softcap is None:
            return self.logit_scale
        return (logits / self.softcap).square_().neg_().add_(1.0).mul_(self.logit_scale)


class ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        logit_scale: float,
        softcap: float | None,
        dtype: torch.dtype,
    ) -> Tensor:
        head = Head(weight, bias, logit_scale, softcap, dtype)
        log_sum_exp = hidden.new_empty(len(targets), dtype=head.wide)
        scores = torch.empty_like(log_sum_exp)

        for part in head.blocks(len(targets)):
            block = head.logits(hidden[part])
            scores[part] = block.gather(1, targets[part, None])[:, 0]
            highest = block.amax(dim=1, keepdim=True)
            log_sum_exp[part] = block.sub_(highest).exp_().sum(dim=1).log_() + highest[:, 0]
            del block

        ctx.save_for_backward(hidden, weight, bias, targets, log_sum_exp)
        ctx.head_options = (logit_scale, softcap, dtype)
        return scores - log_sum_exp

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "chunked log-probs cannot be differentiated twice (create_graph = True): use impl = 'eager'."
            )
        hidden, weight, bias, targets, log_sum_exp = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        with torch.autocast(hidden.device.type, enabled=False):
            head = Head(weight, bias, *ctx.head_options)
            grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=head.wide) if wants_weight else None
            grad_bias = torch.zeros_like(bias, dtype=head.wide) if wants_bias else None

            for part in head.blocks(len(targets)):
                block = head.logits(hidden[part])
                derivative = head.derivative(block)
                # d log p(target) / d logits = onehot(target) - p
                block.sub_(log_sum_exp[part, None]).exp_().mul_(-grad[part, None])
                block.scatter_add_(1, targets[part, None], grad[part, None])
                block *= derivative

                if grad_bias is not None:
                    grad_bias += block.sum(dim=0)
                narrow = block.to(head.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = product(narrow, head.weight)
                if grad_weight is not None and head.dtype == head.wide:
                    grad_weight.addmm_(narrow.T, hidden[part].to(head.dtype))
                elif grad_weight is not None:
                    grad_weight += narrow.T @ hidden[part].to(head.dtype)
                del block, derivative, narrow

        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


@jaxtyped(typechecker=beartype)
def token_log_probs(
    hidden: Float[Tensor, "t d"],
    weight: Float[Tensor, "v d"],
    targets: Int[Tensor, "t"],
    bias: Float[Tensor, "v"] | None,
    logit_scale: float,
    softcap: float | None,
) -> Float[Tensor, "t"]:
    dtype = compute_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        return ChunkedLogProbs.apply(hidden, weight, bias, targets, logit_scale, softcap, dtype)
