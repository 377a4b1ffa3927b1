"""A tile of logits in one Triton kernel: read once for its log-sum-exp, and once more to be written over.

The products stay with cuBLAS, which a tiled product in Triton does not reach; what lies between them is a
read and, where gradients are wanted, a write of the tile in the products' dtype, where torch's operations
would make float32 copies of it. On paper, for bfloat16 at t = 8,192, d = 2,048, v = 128,256 (1.05e9 logits,
2.1 GB) on an H100 (3.35 TB/s; about 700 TFLOP/s in such products):

    product                6.1 ms
    read of all tiles      0.6 ms
    write of all tiles     0.6 ms

so that a frozen head takes 12.3 ms of products and 2.5 ms of traffic, forward and backward together, where
recomputing in backward would take 18.4 ms of products alone; a product that folds its tile before it leaves
the chip (as cut cross-entropy does) saves at most those 2.5 ms, and would have to reach 83% of cuBLAS's rate
to break even. These are estimates; `tests/benchmarks/log_probs.py` measures.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from dpo_wrapper.log_probs import torch_tile as chunked
from dpo_wrapper.log_probs.eager import compute_dtype
from dpo_wrapper.log_probs.statistics import Folded

BLOCK = 4096
"""Words that one program holds at a time."""


@triton.jit
def _logits(pointer, bias, at, inside, scale, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """Logits of some words and their slopes, in float32."""
    x = tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    x *= scale
    slope = tl.zeros_like(x) + scale
    if HAS_CAP:
        # tanh by exp of what is never positive
        small = tl.exp(-2.0 * tl.abs(x / softcap))
        bent = (1.0 - small) / (1.0 + small)
        bent = tl.where(x < 0, -bent, bent)
        x = bent * softcap
        slope *= 1.0 - bent * bent
    return x, slope


@triton.jit
def _fold_row(
    block,
    local,
    bias,
    lse_out,
    own_out,
    slope_out,
    entropy_out,
    squares_out,
    highest_out,
    total,
    at_target,
    stride,
    width,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    MOMENTS: tl.constexpr,
    WRITE: tl.constexpr,
    AGAINST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block += row * stride
    target = tl.load(local + row)
    low = float("-inf")
    highest = tl.full((), low, tl.float32)
    sum_exp = tl.zeros((), tl.float32)
    sum_exp_x = tl.zeros((), tl.float32)
    sum_exp_2 = tl.zeros((), tl.float32)
    own = tl.zeros((), tl.float32)
    own_slope = tl.zeros((), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        x, slope = _logits(block, bias, at, inside, scale, softcap, HAS_BIAS, HAS_CAP)
        is_target = at == target
        own += tl.sum(tl.where(is_target, x, 0.0))
        own_slope += tl.sum(tl.where(is_target, slope, 0.0))
        x = tl.where(inside & (at != target), x, low)
        new = tl.maximum(highest, tl.max(x))
        reference = tl.where(new == low, 0.0, new)
        fade = tl.exp(highest - reference)
        e = tl.exp(x - reference)
        if MOMENTS:  # Σ e·(x - highest), moved to the new highest
            moved = sum_exp * tl.where(highest == low, 0.0, highest - reference)
            sum_exp_x = (sum_exp_x + moved) * fade + tl.sum(tl.where(e > 0.0, e * (x - reference), 0.0))
            sum_exp_2 = sum_exp_2 * fade * fade + tl.sum(e * e)
        sum_exp = sum_exp * fade + tl.sum(e)
        highest = new
    some = sum_exp > 0.0
    lse = tl.where(some, highest + tl.log(tl.where(some, sum_exp, 1.0)), low)
    tl.store(lse_out + row, lse)
    tl.store(own_out + row, own)
    tl.store(slope_out + row, own_slope)
    if MOMENTS:
        safe = tl.where(some, sum_exp, 1.0)
        tl.store(entropy_out + row, tl.log(safe) - sum_exp_x / safe)
        tl.store(squares_out + row, sum_exp_2 / (safe * safe))
        tl.store(highest_out + row, highest)
    if WRITE:
        against = lse
        if AGAINST:
            against = tl.load(total + row)
        against = tl.where(against == low, 0.0, against)
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < width
            x, slope = _logits(block, bias, at, inside, scale, softcap, HAS_BIAS, HAS_CAP)
            p = tl.exp(x - against) * slope
            if AGAINST:
                p = tl.where(at == target, -tl.load(at_target + row), p)
            else:
                p = tl.where(at == target, 0.0, p)
            tl.store(block + at, p.to(block.dtype.element_ty), mask=inside)


def fold(
    block: Float[Tensor, "r w"],
    local: Int[Tensor, "r"],
    bias: Float[Tensor, "w"] | None,
    logit_scale: float,
    softcap: float | None,
    *,
    write: bool = False,
    moments: bool = False,
    total: Float[Tensor, "r"] | None = None,
    at_target: Float[Tensor, "r"] | None = None,
    out: Float[Tensor, "r w"] | None = None,
) -> Folded:
    """As `chunked.fold`, in float32; what is written is written over the tile itself, never into `out`."""
    rows, width = block.shape
    lse, own, slope, entropy, squares, highest = torch.empty(6, rows, device=block.device).unbind()
    _fold_row[(rows,)](
        block,
        local,
        block if bias is None else bias.contiguous(),
        lse,
        own,
        slope,
        entropy,
        squares,
        highest,
        lse if total is None else total,
        lse if at_target is None else at_target,
        block.stride(0),
        width,
        logit_scale,
        1.0 if softcap is None else softcap,
        HAS_BIAS=bias is not None,
        HAS_CAP=softcap is not None,
        MOMENTS=moments,
        WRITE=write or total is not None,
        AGAINST=total is not None,
        BLOCK=min(BLOCK, triton.next_power_of_2(width)),
        num_warps=8,
    )
    return Folded(block, lse, own, slope, (entropy, squares, highest) if moments else None)


def runs_on(device: torch.device) -> bool:
    """Whether Triton can compile for a device, or only interprets (which it does on any)."""
    return device.type == "cuda" or not isinstance(_fold_row, triton.JITFunction)


def token_log_probs(hidden: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """As `chunked.token_log_probs`, to which float64 is left."""
    wide = compute_dtype(hidden, weight) == torch.float64
    return chunked.token_log_probs(hidden, weight, *args, fold=chunked.fold if wide else fold, **kwargs)
