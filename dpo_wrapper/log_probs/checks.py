"""Checks of the arguments of `token_log_probs`, before anything is computed."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_wrapper.log_probs.eager import EXTRAS
from dpo_wrapper.log_probs.fused_backward import FusedLoss


def check_inputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> None:
    """Raise TypeError or ValueError unless types, shapes, dtypes and devices fit."""
    for name, tensor, ndim in (("hidden", hidden, 2), ("weight", weight, 2), ("targets", targets, 1)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} should be a tensor, but it is a {type(tensor).__name__}.")
        if tensor.ndim != ndim:
            raise ValueError(f"{name} should have {ndim} dimensions, but its shape is {tuple(tensor.shape)}.")
    for name, other in {"weight": weight, "targets": targets, "bias": bias}.items():
        if other is not None and other.device != hidden.device:
            raise ValueError(
                f"{name} should be on {hidden.device} like hidden, but it is on {other.device}: "
                "move one of them."
            )
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise TypeError(
            f"hidden and weight should be floats, but they are {hidden.dtype} and {weight.dtype}."
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets should be token ids (int64), but they are {targets.dtype}.")
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"weight should be {hidden.shape[1]} wide like hidden, but it is {weight.shape[1]} wide: "
            "take both from the same model."
        )
    if len(hidden) != len(targets):
        raise ValueError(
            f"targets should be one for each of {len(hidden)} hidden states, but there are {len(targets)}: "
            "select both by the same mask."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias should have shape ({len(weight)},), but its shape is {tuple(bias.shape)}.")
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"bias should be floats, but it is {bias.dtype}.")
    if isinstance(logit_scale, Tensor) or not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale should be a finite number, but it is {logit_scale}.")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap should be positive, but it is {softcap}.")


def check_extras(extras: Sequence[str]) -> None:
    """Raise ValueError unless extras are a list of `EXTRAS`."""
    if isinstance(extras, str) or not set(extras) <= set(EXTRAS):
        raise ValueError(f"extras should be a list of names from {', '.join(EXTRAS)}, but it is {extras!r}.")


def check_fused_loss(fused_loss: FusedLoss | None, targets: Tensor) -> None:
    """Raise TypeError or ValueError unless a fused loss, if given, fits the targets."""
    if fused_loss is None:
        return
    if not isinstance(fused_loss, FusedLoss):
        raise TypeError(
            f"fused_loss should be a FusedLoss, but it is a {type(fused_loss).__name__}: "
            "wrap it in FusedLoss."
        )
    if fused_loss.groups is not None and fused_loss.groups.shape != targets.shape:
        raise ValueError(
            f"groups of fused_loss should have the shape of targets, {tuple(targets.shape)}, "
            f"but its shape is {tuple(fused_loss.groups.shape)}."
        )


def check_in_vocabulary(targets: Tensor, v: int) -> None:
    """Raise ValueError unless all targets are in [0, v)."""
    low, high = torch.stack(torch.aminmax(targets)).tolist() if targets.numel() else (0, -1)
    if low < 0 or high >= v:
        outside = targets[(targets < 0) | (targets >= v)][0].item()
        raise ValueError(f"targets should be in [0, {v}), but one is {outside}.")
