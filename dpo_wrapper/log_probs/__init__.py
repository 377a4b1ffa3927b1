"""The masked log-prob gather: from hidden states and an output head to the log-prob of each scored token.

The hidden states `h` of t scored tokens, each of width d, are multiplied by a head `W` of v vocabulary
entries. `f` applies the head's scale and softcap, and `y` are the targets:

    x = f(h Wᵀ + b)                                  # [t, v], never in memory as a whole
    log p = x[y] - logsumexp(x)                      # [t]

The logits `x` are computed in tiles of some tokens by some vocabulary entries, each of which is reduced by an
online softmax before the next. docs/log_probs.md says what each case costs in products, traffic and memory.

Every implementation is tested against the slow lines of `eager`. Read `tiled` first: an autograd Function
over `tiles` of logits, which uses `forward` and `backward`, the `statistics` of an online softmax, a
`softmax_cache`, and `fused_backward`. The softmax of a tile is computed by `torch_tile` on any device, or by
`triton_tile` on CUDA. `vocab_parallel` is for heads whose vocabulary is divided among processes, and
`from_logits` for models that return logits only.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dpo_wrapper.log_probs import eager, torch_tile
from dpo_wrapper.log_probs.checks import check_extras, check_fused_loss, check_in_vocabulary, check_inputs
from dpo_wrapper.log_probs.dtypes import accumulation_dtype
from dpo_wrapper.log_probs.eager import EXTRAS
from dpo_wrapper.log_probs.from_logits import gather_log_probs, log_probs_from_logits
from dpo_wrapper.log_probs.fused_backward import FusedLoss
from dpo_wrapper.log_probs.vocab_parallel import full_weight, vocab_offset

__all__ = [
    "EXTRAS",
    "FusedLoss",
    "Impl",
    "accumulation_dtype",
    "choose_impl",
    "gather_log_probs",
    "log_probs_from_hidden",
    "log_probs_from_logits",
    "token_log_probs",
]

Impl = Literal["auto", "triton", "chunked", "eager"]
"""`'auto'` is `'triton'` on CUDA where triton is installed, else `'chunked'`. `'chunked'` computes tiles by
torch's operations. `'eager'` computes all logits at once."""


def choose_impl(impl: Impl, device: torch.device | None = None) -> Callable[..., tuple[Tensor, ...]]:
    """The function that computes log-probs.

    Args:
        impl: its name.
        device: where it has to run; without one, `'triton'` need only be installed.

    Raises:
        ValueError: there is no implementation of that name, or it does not run on the device.
        ImportError: it needs triton, which is not installed.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl should be one of {', '.join(get_args(Impl))}, but it is {impl!r}.")
    if impl == "eager":
        return eager.token_log_probs
    if impl == "chunked" or (impl == "auto" and (device is None or device.type != "cuda")):
        return torch_tile.token_log_probs
    try:
        import dpo_wrapper.log_probs.triton_tile as triton_tile
    except ImportError:
        if impl == "auto":
            return torch_tile.token_log_probs
        raise ImportError(
            "triton should be installed for impl = 'triton', but it is not: pip install triton."
        ) from None
    if device is not None and not triton_tile.is_available_on(device):
        raise ValueError(
            f"tensors should be on CUDA for impl = 'triton', but they are on {device}: use 'auto'."
        )
    return triton_tile.token_log_probs


@overload
def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    impl: Impl = ...,
    fused_loss: FusedLoss | None = ...,
    vocab_group: ProcessGroup | None = ...,
) -> Tensor: ...


@overload
def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    impl: Impl = ...,
    extras: Sequence[str],
    fused_loss: FusedLoss | None = ...,
    vocab_group: ProcessGroup | None = ...,
) -> tuple[Tensor, dict[str, Tensor]]: ...


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: Impl = "auto",
    extras: Sequence[str] = (),
    fused_loss: FusedLoss | None = None,
    vocab_group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of `targets` in nats, without ever holding all the logits.

    Equal to:

        logits = logit_scale * (hidden @ weight.T + bias)
        logits = softcap * tanh(logits / softcap)                   # where a softcap is given
        logits.float().log_softmax(-1)[range(t), targets]

    Args:
        hidden: Float[t d], the hidden state that each target is predicted from.
        weight: Float[v d], the output head. One that FSDP2 has sharded is gathered.
        targets: Int[t], each in [0, v).
        bias: Float[v].
        logit_scale: factor of the logits.
        softcap: the bound of the capped logits.
        impl: `'auto'`, `'triton'` (CUDA), `'chunked'` or `'eager'`.
        extras: names of what else to compute, without gradients: `'entropy'` in nats, `'log_sum_p2'` (log Σ
            p² over the vocabulary), `'top1'` (Bool, whether no entry is likelier than the target), `'greedy'`
            (the likeliest entry's log-prob).
        fused_loss: the loss that the log-probs enter. While the head trains, its gradients are then computed
            during the forward pass, a few groups at a time, in much less memory. Backward multiplies them, or
            computes them again if another gradient arrives than this loss has. The results are the same up to
            rounding.
        vocab_group: a torch.distributed group whose processes, in the order of their ranks, hold consecutive
            slices of the vocabulary as `weight` and `bias`. They all pass the same hidden states and the same
            targets, which are ids of the whole vocabulary.

    Returns:
        Float[t], at most 0, in float32 (float64 where the inputs are); with extras a tuple of that and a dict
        of Float[t] or Bool[t].

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or options that do not fit, before anything is
        computed. ImportError: `impl = 'triton'` without triton.
    """
    return log_probs_from_hidden(
        hidden,
        weight,
        targets,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        impl=impl,
        extras=extras,
        fused_loss=fused_loss,
        vocab_group=vocab_group,
        are_targets_known=False,
    )


def log_probs_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    impl: Impl,
    extras: Sequence[str],
    fused_loss: FusedLoss | None,
    vocab_group: ProcessGroup | None = None,
    are_targets_known: bool = True,
) -> Any:
    """`token_log_probs` of targets that are known to be in the vocabulary; waits for no device."""
    weight, bias = full_weight(weight), None if bias is None else full_weight(bias)
    check_inputs(hidden, weight, targets, bias, logit_scale, softcap)
    check_extras(extras)
    check_fused_loss(fused_loss, targets)
    function = choose_impl(impl, hidden.device)
    if impl == "eager" and vocab_group is not None:
        raise ValueError("impl should be tiled with a vocab_group, but it is 'eager': use 'auto'.")
    offset, vocab_size = vocab_offset(weight, vocab_group)
    if not are_targets_known:
        check_in_vocabulary(targets, vocab_size)
    options: dict[str, Any] = {}
    if impl != "eager":
        options = {"fused_loss": fused_loss, "vocab_group": vocab_group, "vocab_offset": offset}
    softcap = None if softcap is None else float(softcap)
    inputs = (hidden, weight, targets.long(), bias, float(logit_scale), softcap)
    log_probs, *values = function(*inputs, needs_extras=bool(extras), **options)
    if not extras:
        return log_probs
    by_name = dict(zip(EXTRAS, values, strict=True))
    return log_probs, {name: by_name[name] for name in extras}
