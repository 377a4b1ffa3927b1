"""How far the results of two paths may be apart by rounding."""

import torch
from beartype import beartype
from jaxtyping import Float, jaxtyped
from torch import Tensor, nn

from dpo_wrapper.models.list_modules import list_parameters

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest error of log-probs that counts as rounding, relative to how far they are apart."""

GRADIENT_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 2e-1, torch.bfloat16: 7e-1}
"""The same of a parameter's gradient, relative to its norm; those of another function differ by about 1."""


def narrowest_dtype(model: nn.Module, device: torch.device) -> torch.dtype:
    """The narrowest dtype that a model computes in: autocast's where it is on, else that of its weights."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    dtypes = {p.dtype for p in list_parameters(model) if p.is_floating_point()}
    return max(dtypes, key=lambda dtype: TOLERANCE.get(dtype, 0.1), default=torch.float64)


@jaxtyped(typechecker=beartype)
def relative_error(
    values: Float[Tensor, "*n"],
    expected: Float[Tensor, "*n"],
    dtype: torch.dtype = torch.float64,
    quantile: float = 1.0,
) -> tuple[float, bool]:
    """The largest error relative to the spread of the expected values, and whether it is more than rounding.

    The spread is the largest distance from their mean: that of log-probs is small in a model whose weights
    are, though all of them are near minus the log of a large vocabulary. Values that stand for minus infinity
    (masked tokens of a vocabulary) are no scale for the others. `dtype` is what the values were computed in,
    if narrower than their own. Errors above the `quantile` do not count.
    """
    tolerance = max(TOLERANCE.get(used, 0.1) for used in (values.dtype, expected.dtype, dtype))
    limit = torch.finfo(expected.dtype).max / 2
    # an Apple GPU has no float64
    values, expected = (tensor.detach().cpu().double() for tensor in (values, expected))
    finite = expected[expected.abs() < limit]
    spread = (finite - finite.mean()).abs().max() if len(finite) else expected.new_zeros(())
    magnitude = finite.abs().max() if len(finite) else expected.new_zeros(())
    scale = torch.maximum(spread, 0.01 * magnitude).clamp(min=1e-12)
    difference = (values - expected).abs().masked_fill(values == expected, 0.0)
    error = (difference.max() if quantile == 1.0 else difference.quantile(quantile)).item() / scale.item()
    return error, not error <= tolerance  # NaN counts as a difference


def why_log_probs_differ(
    values: Float[Tensor, "*n"], expected: Float[Tensor, "*n"], dtype: torch.dtype, quantile: float = 1.0
) -> str | None:
    """By how much log-probs are off, in words; None if it is rounding. Arguments as in `relative_error`."""
    error, differs = relative_error(values, expected, dtype, quantile)
    return f"its log-probs would differ (by {error:.1e}, relatively)" if differs else None


def why_gradients_differ(
    gradients: list[Tensor | None], expected: list[Tensor | None], dtype: torch.dtype
) -> str | None:
    """The largest error of a gradient relative to its norm, in words; None if it is rounding.

    None stands for a gradient of zeros. Gradients that are small beside the largest count for little.
    """
    norms, errors = [], []
    for gradient, truth in zip(gradients, expected, strict=True):
        known = truth if truth is not None else gradient
        if known is None:
            continue
        zeros = torch.zeros_like(known)
        gradient, truth = (
            (zeros if tensor is None else tensor).detach().cpu().double() for tensor in (gradient, truth)
        )
        norms.append(truth.norm())
        errors.append((gradient - truth).norm())
    if not norms:
        return None
    norm, difference = torch.stack(norms), torch.stack(errors)
    error = (difference / norm.clamp(min=1e-2 * float(norm.max())).clamp(min=1e-30)).max().item()
    if error <= GRADIENT_TOLERANCE.get(dtype, 0.3):  # which NaN is not
        return None
    return f"its gradients would differ (by {error:.1e}, relatively)"
