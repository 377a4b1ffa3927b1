"""The masked log-prob gather: from hidden states and output head to the log-prob of each scored token.

What is computed, with h the hidden states of t scored tokens (the masked ones have been left out before), W
the head of v words, y the targets, f the head's scale and softcap:

    x = f(h Wᵀ + b)                [t, v], a tile [r, w] at a time
    log p = log σ(x_y - lse of x over all words but y)

In which pass, at what cost (products of 2·t·d·v FLOPs; t·v numbers written and read between products):

                                   products    tile traffic           beside inputs and gradients
    reference, evaluation          1           write, read            a tile (two with extras)
    frozen head (LoRA)   forward   2           write, read, write,    a tile, [t, d] in float32
                                               read
                         backward  0
    trained head, loss   forward   3           write, read, write,    a tile, [t, d], softmaxes
    known ahead                                read, read             of a part of the tokens
                         backward  0
    trained head, kept   forward   1           write, read, write     a tile, softmaxes [t, v]
                         backward  2           read, read             a tile, [t, d] in float32
    trained head, else   forward   1           write, read            a tile
                         backward  3           write, read, write,    a tile, [t, d] in float32
                                               read, read

A trained head needs each softmax twice, the second time weighed by what comes back from the loss. Who says
ahead what loss that is, as `DPO` does by itself, has the gradients made part by part, in forward (but for
float16, and for bfloat16 weights in several parts, whose gradient would have to be summed in float32). Else
softmaxes are kept tile by tile as far as there is room for them (`chunked.keep_bytes`: on the CPU as much as
training the head takes anyway, so all of them for up to 4·d tokens), and the other tiles are computed again;
backward gives their memory back as it uses them, so that the head's gradient takes its place.

An eager log-softmax takes 1 and 2 products, and holds about four times [t, v] in float32.

    eager      the plain lines; the truth that all others are held against
    tiled      the algorithm: one sweep over the tiles, then gradients
    ahead      the same part by part, where the loss is known
    tiles      how many tokens and words a tile has, and its logits
    statistics   what tiles are weighed by, and the extras
    weighed    the gradient for hidden states under a frozen head
    kept       softmaxes on their way to the gradients
    gradients  of hidden states and head, from tiles that are kept or computed again
    chunked    a tile's softmax by torch's operations: any device
    triton     a tile's softmax in one kernel: CUDA
    sharded    heads in parts on several processes
    from_logits  for models that hand out nothing but logits
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dpo_wrapper.log_probs import eager
from dpo_wrapper.log_probs import torch_tile as chunked
from dpo_wrapper.log_probs.eager import EXTRAS, accumulation_dtype
from dpo_wrapper.log_probs.from_logits import log_probs_of_rows
from dpo_wrapper.log_probs.fused_backward import FusedLoss
from dpo_wrapper.log_probs.vocab_parallel import first_word, whole

__all__ = [
    "EXTRAS",
    "FusedLoss",
    "Impl",
    "accumulation_dtype",
    "log_probs_from_logits",
    "log_probs_of_rows",
    "token_log_probs",
]

Impl = Literal["auto", "triton", "chunked", "eager"]


def choose_impl(impl: str, device: torch.device | None = None) -> Callable[..., tuple[Tensor, ...]]:
    """The function behind a name; `'auto'` takes the best there is, a name that is not there raises."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl should be one of {', '.join(get_args(Impl))}, but it is {impl!r}.")
    if impl == "eager":
        return eager.token_log_probs
    if impl == "triton" or (impl == "auto" and device is not None and device.type == "cuda"):
        try:
            import dpo_wrapper.log_probs.triton_tile as triton_kernels
        except ImportError:
            if impl == "triton":
                raise ImportError("impl = 'triton' needs triton: pip install triton.") from None
        else:
            if device is None or triton_kernels.runs_on(device):
                return triton_kernels.token_log_probs
            if impl == "triton":
                raise ValueError(
                    f"impl = 'triton' needs tensors on CUDA, but they are on {device}: use 'auto'."
                )
    return chunked.token_log_probs


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
    extras: Sequence[str] = (),
    fused_loss: FusedLoss | None = None,
    vocab_group: Any = None,
) -> Any:
    """Log-probs of `targets` in nats, without ever holding all the logits. It equals

        logits = logit_scale * (hidden @ weight.T + bias)
        logits = softcap * tanh(logits / softcap)                   # where a softcap is given
        logits.float().log_softmax(-1)[range(t), targets]

    Args:
        hidden: Float[t d], the hidden state each target is predicted from.
        weight: Float[v d], the output head; one that FSDP2 has sharded is gathered.
        targets: Int[t], each in [0, v).
        bias: Float[v].
        impl: `'auto'`, `'triton'` (CUDA), `'chunked'` or `'eager'`.
        extras: names of what else is wanted, without gradients: `'entropy'` in nats, `'log_sum_p2'` (log Σ p²
            over the vocabulary), `'top1'` (Bool, whether no word is likelier than the target), `'greedy'`
            (the likeliest word's log-prob).
        fused_loss: what the log-probs will be made into. While the head trains, gradients are then made in
            forward, a few groups at a time, in much less memory; backward multiplies them, or computes them
            again where what comes back is something else. The numbers are the same, but for rounding.
        vocab_group: a torch.distributed group whose processes, in the order of their ranks, hold consecutive
            parts of the vocabulary as `weight` and `bias`; hidden and targets are then the same on each of
            them, targets being ids of the whole.

    Returns:
        Float[t], at most 0, in float32 (float64 where the inputs are); with extras a tuple of that and a dict
        of Float[t] or Bool[t].

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or options that do not fit, before anything is
            computed.
    """
    weight, bias = whole(weight), None if bias is None else whole(bias)
    check(hidden, weight, targets, bias, logit_scale, softcap)
    unknown = sorted(set(extras) - set(EXTRAS))
    if unknown or isinstance(extras, str):
        raise ValueError(f"extras should be among {', '.join(EXTRAS)}, as a list, but they are {extras!r}.")
    options: dict[str, Any] = {"extras": bool(extras)}
    if fused_loss is not None:
        check_fused_loss(fused_loss, targets)
    if impl != "eager":
        options["fused_loss"] = fused_loss
    vocabulary = len(weight)
    if vocab_group is not None:
        if impl == "eager":
            raise ValueError("impl = 'eager' takes a whole head: use 'auto' with a vocab_group.")
        options["offset"], vocabulary = first_word(weight, vocab_group)
        options["group"] = vocab_group
    if targets.numel() and not (targets.min() >= 0 and targets.max() < vocabulary):
        outside = targets[(targets < 0) | (targets >= vocabulary)][0].item()
        raise ValueError(f"targets should be in [0, {vocabulary}), but one is {outside}.")
    softcap = None if softcap is None else float(softcap)
    function = choose_impl(impl, hidden.device)
    log_probs, *found = function(hidden, weight, targets.long(), bias, float(logit_scale), softcap, **options)
    return (
        (log_probs, {name: dict(zip(EXTRAS, found, strict=True))[name] for name in extras})
        if extras
        else log_probs
    )


def check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> None:
    """Whether the arguments of `token_log_probs` fit one another."""
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


def check_fused_loss(fused_loss: object, targets: Tensor) -> None:
    if not isinstance(fused_loss, FusedLoss):
        raise TypeError(f"fused_loss should be a FusedLoss, but it is a {type(fused_loss).__name__}.")
    if fused_loss.groups is not None and fused_loss.groups.shape != targets.shape:
        shapes = f"{tuple(fused_loss.groups.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"groups should be one number for each target, but their shapes are {shapes}.")


def log_probs_from_logits(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Log-probs of `targets` in nats from logits that are there already, in one pass over them. It equals

        logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]      # and 0 where not mask

    but holds no log-softmax, and computes only what the mask asks for.

    Args:
        logits: Float[... v], in line with the targets: `logits[k]` predicts `targets[k]`.
        targets: Int[...], in [0, v) where the mask is True.
        mask: Bool[...], True on tokens to be scored; all of them without it.

    Returns:
        Float[...], at most 0, in float32 (float64 where the logits are).

    Raises:
        TypeError, ValueError: what does not fit, before anything is computed.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError("logits should be a tensor of floats.")
    if not isinstance(targets, Tensor) or targets.dtype not in (torch.int64, torch.int32):
        raise TypeError("targets should be a tensor of token ids (int64).")
    if targets.shape != logits.shape[:-1] or (mask is not None and mask.shape != targets.shape):
        shapes = [tuple(t.shape) for t in (logits, targets, mask) if t is not None]
        raise ValueError(
            f"for logits of shape (..., v), targets and mask should have the shape (...), but the shapes are "
            f"{', '.join(map(str, shapes))}."
        )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask should be bool, but it is {mask.dtype}.")
    v = logits.shape[-1]
    flat = targets.flatten().long()
    every = torch.ones_like(flat, dtype=torch.bool) if mask is None else mask.flatten()
    rows = every.nonzero()[:, 0]
    chosen = flat[rows]
    if chosen.numel() and not (chosen.min() >= 0 and chosen.max() < v):
        outside = chosen[(chosen < 0) | (chosen >= v)][0].item()
        raise ValueError(f"targets should be in [0, {v}), but one is {outside}.")
    scores = log_probs_of_rows(logits.reshape(-1, v), rows, chosen)
    return scores.new_zeros(len(flat)).index_put((rows,), scores).view(targets.shape)
