"""The softmax of a tile in one Triton kernel: CUDA.

The kernel reads a tile once for its log-sum-exps and, where gradients are needed, once more to overwrite it,
in the dtype of the matrix products. torch's operations would make float32 copies of it. The products are left
to cuBLAS, whose rate a tiled product in Triton does not reach.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from dpo_wrapper.log_probs import tiled, torch_tile
from dpo_wrapper.log_probs.dtypes import compute_dtype
from dpo_wrapper.log_probs.statistics import TileSoftmax

BLOCK_SIZE = 4096
"""The vocabulary entries that a program holds at a time."""


@triton.jit
def _load_logits(tile, bias, column, is_valid, scale, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """Logits of a block and their slopes, in float32."""
    x = tl.load(tile + column, mask=is_valid, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + column, mask=is_valid, other=0.0).to(tl.float32)
    x *= scale
    slope = tl.zeros_like(x) + scale
    if HAS_CAP:
        # tanh from e^(-2|x|), which cannot overflow
        decay = tl.exp(-2.0 * tl.abs(x / softcap))
        tanh = (1.0 - decay) / (1.0 + decay)
        tanh = tl.where(x < 0, -tanh, tanh)
        x = tanh * softcap
        slope *= 1.0 - tanh * tanh
    return x, slope


@triton.jit
def _tile_softmax_kernel(
    tile,
    target_column,
    bias,
    lse_out,
    target_logit_out,
    target_slope_out,
    entropy_out,
    sum_p2_out,
    max_out,
    lse,
    target_grad,
    stride,
    width,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    NEEDS_MOMENTS: tl.constexpr,
    NEEDS_WRITE: tl.constexpr,
    HAS_LSE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """One program for each token of the tile."""
    token = tl.program_id(0).to(tl.int64)
    tile += token * stride
    target = tl.load(target_column + token)
    minus_inf = float("-inf")
    max_logit = tl.full((), minus_inf, tl.float32)
    sum_exp = tl.zeros((), tl.float32)
    sum_exp_x = tl.zeros((), tl.float32)
    sum_exp_2 = tl.zeros((), tl.float32)
    target_logit = tl.zeros((), tl.float32)
    target_slope = tl.zeros((), tl.float32)
    for start in range(0, width, BLOCK_SIZE):
        column = start + tl.arange(0, BLOCK_SIZE)
        is_valid = column < width
        x, slope = _load_logits(tile, bias, column, is_valid, scale, softcap, HAS_BIAS, HAS_CAP)
        is_target = column == target
        target_logit += tl.sum(tl.where(is_target, x, 0.0))
        target_slope += tl.sum(tl.where(is_target, slope, 0.0))
        x = tl.where(is_valid & (column != target), x, minus_inf)
        new_max = tl.maximum(max_logit, tl.max(x))
        finite_max = tl.where(new_max == minus_inf, 0.0, new_max)
        rescale = tl.exp(max_logit - finite_max)
        e = tl.exp(x - finite_max)
        if NEEDS_MOMENTS:  # Σ e·(x - max), moved to the new maximum
            moved = sum_exp * tl.where(max_logit == minus_inf, 0.0, max_logit - finite_max)
            sum_exp_x = (sum_exp_x + moved) * rescale + tl.sum(tl.where(e > 0.0, e * (x - finite_max), 0.0))
            sum_exp_2 = sum_exp_2 * rescale * rescale + tl.sum(e * e)
        sum_exp = sum_exp * rescale + tl.sum(e)
        max_logit = new_max
    has_entries = sum_exp > 0.0
    tile_lse = tl.where(has_entries, max_logit + tl.log(tl.where(has_entries, sum_exp, 1.0)), minus_inf)
    tl.store(lse_out + token, tile_lse)
    tl.store(target_logit_out + token, target_logit)
    tl.store(target_slope_out + token, target_slope)
    if NEEDS_MOMENTS:
        positive_sum = tl.where(has_entries, sum_exp, 1.0)
        tl.store(entropy_out + token, tl.log(positive_sum) - sum_exp_x / positive_sum)
        tl.store(sum_p2_out + token, sum_exp_2 / (positive_sum * positive_sum))
        tl.store(max_out + token, max_logit)
    if NEEDS_WRITE:
        normalizer, target_value = tile_lse, 0.0
        if HAS_LSE:
            normalizer, target_value = tl.load(lse + token), -tl.load(target_grad + token)
        normalizer = tl.where(normalizer == minus_inf, 0.0, normalizer)
        for start in range(0, width, BLOCK_SIZE):
            column = start + tl.arange(0, BLOCK_SIZE)
            is_valid = column < width
            x, slope = _load_logits(tile, bias, column, is_valid, scale, softcap, HAS_BIAS, HAS_CAP)
            p = tl.where(column == target, target_value, tl.exp(x - normalizer) * slope)
            tl.store(tile + column, p.to(tile.dtype.element_ty), mask=is_valid)


def tile_softmax(
    tile: Float[Tensor, "r w"],
    target_column: Int[Tensor, "r"],
    bias: Float[Tensor, "w"] | None,
    logit_scale: float,
    softcap: float | None,
    *,
    needs_softmax: bool = False,
    needs_moments: bool = False,
    lse: Float[Tensor, "r"] | None = None,
    target_grad: Float[Tensor, "r"] | None = None,
    out: Float[Tensor, "r w"] | None = None,
) -> TileSoftmax:
    """`torch_tile.tile_softmax` in float32; the softmax overwrites the tile itself, and `out` is unused."""
    tokens, width = tile.shape
    outputs = torch.empty(6, tokens, device=tile.device).unbind()
    tile_lse, target_logit, target_slope, entropy, sum_p2, max_logit = outputs
    _tile_softmax_kernel[(tokens,)](
        tile,
        target_column,
        tile if bias is None else bias.contiguous(),
        *outputs,
        tile_lse if lse is None else lse,
        tile_lse if target_grad is None else target_grad,
        tile.stride(0),
        width,
        logit_scale,
        1.0 if softcap is None else softcap,
        HAS_BIAS=bias is not None,
        HAS_CAP=softcap is not None,
        NEEDS_MOMENTS=needs_moments,
        NEEDS_WRITE=needs_softmax or lse is not None,
        HAS_LSE=lse is not None,
        BLOCK_SIZE=min(BLOCK_SIZE, triton.next_power_of_2(width)),
        num_warps=8,
    )
    moments = (entropy, sum_p2, max_logit) if needs_moments else None
    return TileSoftmax(tile, tile_lse, target_logit, target_slope, moments)


def is_available_on(device: torch.device) -> bool:
    """Whether the kernel runs on a device: compiled on CUDA, or interpreted on any."""
    return device.type == "cuda" or not isinstance(_tile_softmax_kernel, triton.JITFunction)


def token_log_probs(hidden: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """`tiled.token_log_probs` with this kernel, or, in float64, with torch's operations."""
    is_wide = compute_dtype(hidden, weight) == torch.float64
    function = torch_tile.tile_softmax if is_wide else tile_softmax
    return tiled.token_log_probs(hidden, weight, *args, tile_softmax=function, **kwargs)
