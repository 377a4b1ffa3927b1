"""The obvious lines. In float64 they are the truth that every other implementation is held against."""

import torch
from beartype import beartype
from jaxtyping import Float, Int, jaxtyped
from torch import Tensor

EXTRAS = ("entropy", "log_sum_p2", "top1", "greedy")
"""Entropy; log Σ p²; whether no token is likelier than the target; the log-prob of the likeliest."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where the input is float64: the dtype of softmax, sums and losses."""
    return torch.promote_types(dtype, torch.float32)


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the matrix product: autocast's where it is on, else the wider of the two."""
    device = hidden.device.type
    wider = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(device) and wider != torch.float64:  # which autocast leaves alone
        return torch.get_autocast_dtype(device)
    return wider


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
    extras: bool = False,
) -> tuple[Tensor, ...]:
    """Log-probs, and then what `EXTRAS` names."""
    dtype = compute_dtype(hidden, weight)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    logits = logits.to(accumulation_dtype(dtype))
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    log_probs = log_probs_from_logits(logits, targets)
    if not extras:
        return (log_probs,)
    with torch.no_grad():
        every = logits.log_softmax(dim=-1)
        p, own = every.exp(), logits.gather(-1, targets[:, None])[:, 0]
        entropy = -(p * every.clamp(min=torch.finfo(every.dtype).min)).sum(dim=-1)
        top1 = own >= logits.amax(dim=-1)
        return log_probs, entropy, p.square().sum(dim=-1).log(), top1, every.amax(dim=-1)
