"""Tiles by Triton kernels, one program for each token: CUDA.

A program holds the token's row of the tile in registers: it is read once, and overwritten only where another
product needs it, in the dtype of the products. torch's operations would make float32 copies of it. The
products are left to cuBLAS, whose rate a tiled product in Triton does not reach.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from dpo_wrapper.log_probs import tiled, torch_tile
from dpo_wrapper.log_probs.backend import MAX_LOG_WEIGHT, RawTile, ReducedTile, TileBackend
from dpo_wrapper.log_probs.dtypes import compute_dtype
from dpo_wrapper.log_probs.statistics import OnlineSoftmax

MAX_WIDTH = 8192
"""The most vocabulary entries in a tile, which a program holds at once."""


@triton.jit
def _load_logits(tile, bias, column, is_valid, scale, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """A row of logits and their slopes, in float32."""
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
def _entropy_term(share, entropy):
    """What one part of a mixture adds to its entropy: `mixture_entropy` in `statistics`."""
    is_present = share > 0.0
    return tl.where(is_present, share * (entropy - tl.log(tl.where(is_present, share, 1.0))), 0.0)


@triton.jit
def _reduce_kernel(
    tile,
    targets,
    bias,
    statistics,
    reference,
    rescale,
    tile_stride,
    statistics_stride,
    vocab_start,
    width,
    scale,
    softcap,
    max_log_weight,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    NEEDS_MOMENTS: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Include a row in its token's statistics; with a reference, overwrite it by its weighted softmax."""
    token = tl.program_id(0).to(tl.int64)
    tile += token * tile_stride
    statistics += token
    column = tl.arange(0, BLOCK_SIZE)
    is_valid = column < width
    target = tl.load(targets + token) - vocab_start
    is_target = column == target
    minus_inf = float("-inf")
    x, slope = _load_logits(tile, bias, column, is_valid, scale, softcap, HAS_BIAS, HAS_CAP)
    if (target >= 0) & (target < width):
        target_logit = tl.sum(tl.where(is_target, x, 0.0))
        target_slope = tl.sum(tl.where(is_target, slope, 0.0))
        tl.store(statistics + statistics_stride, target_logit)
        tl.store(statistics + 2 * statistics_stride, target_slope)
    x = tl.where(is_valid & (column != target), x, minus_inf)
    max_logit = tl.max(x)
    finite_max = tl.where(max_logit == minus_inf, 0.0, max_logit)
    e = tl.exp(x - finite_max)
    sum_exp = tl.sum(e)
    has_entries = sum_exp > 0.0
    positive_sum = tl.where(has_entries, sum_exp, 1.0)
    tile_lse = tl.where(has_entries, finite_max + tl.log(positive_sum), minus_inf)
    old_lse = tl.load(statistics)
    larger = tl.maximum(old_lse, tile_lse)
    larger = tl.where(larger == minus_inf, 0.0, larger)
    both = tl.exp(old_lse - larger) + tl.exp(tile_lse - larger)
    lse = tl.where(both > 0.0, larger + tl.log(tl.where(both > 0.0, both, 1.0)), minus_inf)
    tl.store(statistics, lse)
    if NEEDS_MOMENTS:
        finite_lse = tl.where(lse == minus_inf, 0.0, lse)
        old_share = tl.exp(old_lse - finite_lse)
        new_share = tl.exp(tile_lse - finite_lse)
        sum_exp_x = tl.sum(tl.where(e > 0.0, e * (x - finite_max), 0.0))
        entropy = tl.log(positive_sum) - sum_exp_x / positive_sum
        sum_p2 = tl.sum(e * e) / (positive_sum * positive_sum)
        old_entropy = tl.load(statistics + 3 * statistics_stride)
        old_sum_p2 = tl.load(statistics + 4 * statistics_stride)
        old_max = tl.load(statistics + 5 * statistics_stride)
        new_entropy = _entropy_term(old_share, old_entropy) + _entropy_term(new_share, entropy)
        new_sum_p2 = old_share * old_share * old_sum_p2 + new_share * new_share * sum_p2
        tl.store(statistics + 3 * statistics_stride, new_entropy)
        tl.store(statistics + 4 * statistics_stride, new_sum_p2)
        tl.store(statistics + 5 * statistics_stride, tl.maximum(old_max, max_logit))
    if HAS_REFERENCE:
        old_reference = tl.load(reference + token)
        raised = tl.where(tile_lse > old_reference + max_log_weight, tile_lse, old_reference)
        finite_raised = tl.where(raised == minus_inf, 0.0, raised)
        tl.store(reference + token, raised)
        tl.store(rescale + token, tl.exp(old_reference - finite_raised))
        p = tl.exp(x - finite_raised) * slope
        tl.store(tile + column, p.to(tile.dtype.element_ty), mask=is_valid)


@triton.jit
def _write_grad_kernel(
    tile,
    targets,
    bias,
    lse,
    target_grad,
    tile_stride,
    vocab_start,
    width,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Overwrite a row by minus d log-prob / d raw product."""
    token = tl.program_id(0).to(tl.int64)
    tile += token * tile_stride
    column = tl.arange(0, BLOCK_SIZE)
    is_valid = column < width
    x, slope = _load_logits(tile, bias, column, is_valid, scale, softcap, HAS_BIAS, HAS_CAP)
    is_target = column == tl.load(targets + token) - vocab_start
    p = tl.where(is_target, -tl.load(target_grad + token), tl.exp(x - tl.load(lse + token)) * slope)
    tl.store(tile + column, p.to(tile.dtype.element_ty), mask=is_valid)


@triton.jit
def _scale_rows_kernel(values, factor, stride, width, BLOCK_SIZE: tl.constexpr):
    """Multiply a row by its factor; a row whose factor is 1 is not read."""
    token = tl.program_id(0).to(tl.int64)
    by = tl.load(factor + token)
    if by != 1.0:
        values += token * stride
        for start in range(0, width, BLOCK_SIZE):
            column = start + tl.arange(0, BLOCK_SIZE)
            x = tl.load(values + column, mask=column < width, other=0.0)
            tl.store(values + column, x * by, mask=column < width)


class TritonBackend(TileBackend):
    """`torch_tile.TorchBackend` in float32. The cache holds raw products: `reduce` does not write them."""

    max_width = MAX_WIDTH

    def entry_bytes(self, matmul_dtype: torch.dtype) -> int:
        return matmul_dtype.itemsize

    def reduce(
        self,
        raw: RawTile,
        statistics: OnlineSoftmax,
        *,
        needs_moments: bool = False,
        needs_tile: bool = False,
        reference_lse: Float[Tensor, "r"] | None = None,
        out: Float[Tensor, "r w"] | None = None,
    ) -> ReducedTile:
        tile, values = raw.product, statistics.values
        rescale = None if reference_lse is None else torch.empty_like(reference_lse)
        with torch.cuda.device_of(tile):  # Triton launches on the current device
            _reduce_kernel[(len(tile),)](
                tile,
                raw.targets,
                tile if raw.bias is None else raw.bias.contiguous(),
                values,
                values if reference_lse is None else reference_lse,
                values if rescale is None else rescale,
                tile.stride(0),
                values.stride(0),
                raw.vocab_start,
                tile.shape[1],
                raw.logit_scale,
                1.0 if raw.softcap is None else raw.softcap,
                MAX_LOG_WEIGHT,
                NEEDS_MOMENTS=needs_moments,
                HAS_REFERENCE=reference_lse is not None,
                **constants(raw),
            )
        return ReducedTile(tile, rescale=rescale)

    def write_grad(
        self,
        raw: RawTile,
        tile_lse: Float[Tensor, "r"] | None,
        lse: Float[Tensor, "r"],
        target_grad: Float[Tensor, "r"],
    ) -> Float[Tensor, "r w"]:
        assert tile_lse is None
        tile = raw.product
        with torch.cuda.device_of(tile):
            _write_grad_kernel[(len(tile),)](
                tile,
                raw.targets,
                tile if raw.bias is None else raw.bias.contiguous(),
                lse,
                target_grad,
                tile.stride(0),
                raw.vocab_start,
                tile.shape[1],
                raw.logit_scale,
                1.0 if raw.softcap is None else raw.softcap,
                **constants(raw),
            )
        return tile

    def scale_rows(self, values: Float[Tensor, "r d"], factor: Float[Tensor, "r"]) -> None:
        width = values.shape[1]
        block_size = min(1024, triton.next_power_of_2(max(1, width)))
        with torch.cuda.device_of(values):
            _scale_rows_kernel[(len(values),)](values, factor, values.stride(0), width, BLOCK_SIZE=block_size)


def constants(raw: RawTile) -> dict[str, Any]:
    """What the kernels are compiled for."""
    block_size = triton.next_power_of_2(raw.product.shape[1])
    return {
        "HAS_BIAS": raw.bias is not None,
        "HAS_CAP": raw.softcap is not None,
        "BLOCK_SIZE": block_size,
        "num_warps": 16 if block_size >= 8192 else 8 if block_size >= 2048 else 4,
    }


def is_available_on(device: torch.device) -> bool:
    """Whether the kernels run on a device: compiled on CUDA, or interpreted on any."""
    return device.type == "cuda" or not isinstance(_reduce_kernel, triton.JITFunction)


def token_log_probs(hidden: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """`tiled.token_log_probs` with these kernels, or, in float64, with torch's operations."""
    is_wide = compute_dtype(hidden, weight) == torch.float64
    backend = torch_tile.TorchBackend() if is_wide else TritonBackend()
    return tiled.token_log_probs(hidden, weight, *args, backend=backend, **kwargs)
