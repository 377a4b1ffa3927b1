"""The masked log-prob gather: from hidden states and output head to the log-prob of each scored token.

eager    the plain lines, with logits [t, v] in memory
chunked  any device; logits exist one block at a time, forward and backward
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from dpo_wrapper.log_probs import chunked, eager
from dpo_wrapper.log_probs.eager import accumulation_dtype, log_probs_from_logits

__all__ = ["Impl", "accumulation_dtype", "log_probs_from_logits", "token_log_probs"]

Impl = Literal["auto", "triton", "chunked", "eager"]

_IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "auto": chunked.token_log_probs,
    "chunked": chunked.token_log_probs,
    "eager": eager.token_log_probs,
}


def implementation(impl: str) -> Callable[..., Tensor]:
    """The function behind a name; `'auto'` takes the best there is, a name that is not there raises."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl should be one of {', '.join(get_args(Impl))}, but it is {impl!r}.")
    if impl not in _IMPLEMENTATIONS:
        raise ValueError(f"impl = {impl!r} is not available in this version: use 'auto' or 'chunked'.")
    return _IMPLEMENTATIONS[impl]


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Log-probs of `targets` in nats, without ever holding all the logits. It equals

        logits = logit_scale * (hidden @ weight.T + bias)
        logits = softcap * tanh(logits / softcap)                   # where a softcap is given
        logits.float().log_softmax(-1)[range(t), targets]

    Args:
        hidden: Float[t d], the hidden state each target is predicted from.
        weight: Float[v d], the output head.
        targets: Int[t], each in [0, v).
        bias: Float[v].
        impl: `'auto'`, `'chunked'` or `'eager'`.

    Returns:
        Float[t], at most 0, in float32 (float64 where the inputs are).

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or options that do not fit, before anything is
            computed.
    """
    function = implementation(impl)
    for name, tensor, ndim in (("hidden", hidden, 2), ("weight", weight, 2), ("targets", targets, 1)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} should be a tensor, but it is a {type(tensor).__name__}.")
        if tensor.ndim != ndim:
            raise ValueError(f"{name} should have {ndim} dimensions, but its shape is {tuple(tensor.shape)}.")
        if tensor.device != hidden.device:
            raise ValueError(
                f"{name} is on {tensor.device} but hidden is on {hidden.device}: move one of them."
            )
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise TypeError(
            f"hidden and weight should be floats, but they are {hidden.dtype} and {weight.dtype}."
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets should be token ids (int64), but they are {targets.dtype}.")
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden is {hidden.shape[1]} wide but weight is {weight.shape[1]} wide.")
    if len(hidden) != len(targets):
        raise ValueError(f"there are {len(hidden)} hidden states but {len(targets)} targets.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias should have shape ({len(weight)},), but its shape is {tuple(bias.shape)}.")
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"bias should be floats, but it is {bias.dtype}.")
    if bias is not None and bias.device != hidden.device:
        raise ValueError(f"bias is on {bias.device} but hidden is on {hidden.device}: move one of them.")
    if isinstance(logit_scale, Tensor) or not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale should be a finite number, but it is {logit_scale}.")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap should be positive, but it is {softcap}.")
    if targets.numel() and not (targets.min() >= 0 and targets.max() < len(weight)):
        outside = targets[(targets < 0) | (targets >= len(weight))][0].item()
        raise ValueError(f"targets should be in [0, {len(weight)}), but one is {outside}.")
    softcap = None if softcap is None else float(softcap)
    return function(hidden, weight, targets.long(), bias, float(logit_scale), softcap)
