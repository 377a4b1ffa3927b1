"""The slow lines that the gather equals: the tests compare the other implementations with them in float64."""

import torch
from beartype import beartype
from jaxtyping import Float, Int, jaxtyped
from torch import Tensor

from dpo_wrapper.log_probs.dtypes import accumulation_dtype, compute_dtype

EXTRAS = ("entropy", "log_sum_p2", "top1", "greedy")
"""Names of what can be computed beside log-probs; `token_log_probs` describes each."""


@jaxtyped(typechecker=beartype)
def log_probs_from_logits(logits: Float[Tensor, "t v"], targets: Int[Tensor, "t"]) -> Float[Tensor, "t"]:
    """`logits.float().log_softmax(-1)[range(t), targets]`, in nats, in float32 or wider."""
    logits = logits.to(accumulation_dtype(logits.dtype))
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(dim=-1)


@jaxtyped(typechecker=beartype)
def token_log_probs(
    hidden: Float[Tensor, "t d"],
    weight: Float[Tensor, "v d"],
    targets: Int[Tensor, "t"],
    bias: Float[Tensor, "v"] | None,
    logit_scale: float,
    softcap: float | None,
    needs_extras: bool = False,
) -> tuple[Tensor, ...]:
    """Log-probs in nats, followed by the `EXTRAS` in their order where `needs_extras`."""
    dtype = compute_dtype(hidden, weight)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    logits = logits.to(accumulation_dtype(dtype))
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    log_probs = log_probs_from_logits(logits, targets)
    if not needs_extras:
        return (log_probs,)
    with torch.no_grad():
        log_p = logits.log_softmax(dim=-1)
        p, target_logit = log_p.exp(), logits.gather(-1, targets[:, None])[:, 0]
        entropy = -(p * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(dim=-1)
        top1 = target_logit >= logits.amax(dim=-1)
        return log_probs, entropy, p.square().sum(dim=-1).log(), top1, log_p.amax(dim=-1)
