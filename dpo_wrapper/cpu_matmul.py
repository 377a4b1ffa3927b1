"""float32 matrix products on the CPU through oneDNN, on processors where torch's own choice is slower.

torch ships two libraries for float32 matrix products, MKL and oneDNN, and takes MKL. On AMD processors MKL
uses AVX2. From family 26 on (Zen 5) they have 512-bit AVX-512 units, with which oneDNN is about twice as
fast. On family 25 (Zen 4), which splits AVX-512 into two halves, both libraries are equally fast. The results
differ by rounding alone. `torch.backends.mkldnn.flags(enabled=False)` turns oneDNN off.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MIN_MULTIPLICATIONS = 2**25
"""torch computes smaller products: oneDNN compiles a kernel for each new shape, which takes about 1 ms."""

MIN_AMD_FAMILY = 26
"""The first family of AMD processors with 512-bit AVX-512 units."""


def cpu_description() -> str:
    """The system's description of the processor; empty on systems other than Linux."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


@lru_cache
def is_onednn_faster() -> bool:
    """Whether oneDNN is faster than MKL, by the model of the processor.

    It is not timed, because the same machine should compute the same numbers each time.
    """
    family = re.search(r"AuthenticAMD\s+cpu family\s*: (\d+)", cpu_description())
    is_recent = family is not None and int(family[1]) >= MIN_AMD_FAMILY
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not (is_recent and has_both and torch.backends.cpu.get_cpu_capability() == "AVX512"):
        return False
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0), device="cpu").unbind()
    try:
        torch._C._autograd._top_saved_tensors_default_hooks(True)  # for `linear`
        return torch.allclose(_onednn_matmul(a, b), a @ b, atol=1e-4)
    except (AttributeError, RuntimeError, TypeError):  # the two are no public part of torch
        return False


def _onednn_matmul(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.T, bias, "none", [], "")


def needs_onednn(a: Tensor, b: Tensor, m: int) -> bool:
    """Whether oneDNN should compute `a @ b` or `a @ b.T`, where `a` has `m` rows."""
    return (
        a.dtype == b.dtype == torch.float32
        and a.device.type == b.device.type == "cpu"
        and m * b.numel() >= MIN_MULTIPLICATIONS
        and bool(torch.backends.mkldnn.enabled)
        and is_onednn_faster()
    )


def matmul(
    a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], buffer: Float[Tensor, "m n"] | None = None
) -> Float[Tensor, "m n"]:
    """`a @ b`, without gradients, in `buffer` or, by oneDNN, in new memory; `a` and `b` may be transposes."""
    return _onednn_matmul(a, b) if needs_onednn(a, b, len(a)) else torch.mm(a, b, out=buffer)


@lru_cache
def can_add_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds a product of narrow matrices to a float32 one (CUDA, torch 2.8): it is tried.

    Otherwise each product is written and read once more, and rounded.
    """
    if device.type != "cuda":
        return False
    a, b = torch.eye(16, dtype=dtype, device=device), torch.full((16, 16), 0.5, dtype=dtype, device=device)
    out = torch.full((16, 16), 1024.25, dtype=torch.float32, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, beta=1.0, out=out)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return bool((out == 1024.75).all())


def add_matmul(
    out: Float[Tensor, "m n"], a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], beta: float = 1.0
) -> None:
    """`out = beta * out + a @ b` in place, without gradients; with `beta = 0`, `out` may be uninitialized.

    `out` may be wider than `a` and `b`, or, with `beta = 0`, narrower. Where torch cannot add to a wider
    `out` itself, the product is first rounded to the dtype of `a` and `b`.
    """
    if out.dtype == a.dtype and not needs_onednn(a, b, len(a)):
        torch.addmm(out, a, b, beta=beta, out=out)
    elif out.dtype == torch.float32 and a.dtype.itemsize == 2 and can_add_to_float32(a.device, a.dtype):
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, beta=beta, out=out)
    elif beta == 0.0:
        out.copy_(matmul(a, b))
    else:
        assert beta == 1.0, beta
        out += matmul(a, b)


class OneDNNLinear(torch.autograd.Function):
    """`x @ weight.T + bias`, differentiable any number of times."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "m k"], weight: Float[Tensor, "n k"], bias: Float[Tensor, "n"] | None
    ) -> Float[Tensor, "m n"]:
        ctx.save_for_backward(x, weight)
        return _onednn_matmul(x, weight.T, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            OneDNNLinear.apply(grad, weight.T, None) if needs_x else None,
            OneDNNLinear.apply(grad.T, x.T, None) if needs_weight else None,
            grad.sum(dim=0) if needs_bias else None,
        )


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, through oneDNN where `needs_onednn` says so."""
    is_plain = type(input) is Tensor and type(weight) in (Tensor, nn.Parameter)
    if (
        not (is_plain and input.ndim > 1 and weight.ndim == 2)
        or not needs_onednn(input, weight, input.numel() // max(1, input.shape[-1]))
        or torch.is_autocast_enabled("cpu")
        # A checkpointed layer runs again in backward, outside of `onednn_linear`, and has to save the same
        # tensors there.
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    ):
        return F.linear(input, weight, bias)
    return OneDNNLinear.apply(input.flatten(0, -2), weight, bias).unflatten(0, input.shape[:-1])


class _OneDNNLinearMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_replaced = func is F.linear and not torch.compiler.is_compiling()
        return (linear if is_replaced else func)(*args, **(kwargs or {}))


def onednn_linear() -> TorchFunctionMode:
    """A context in which every module computes `F.linear` by `linear`; no module is changed."""
    return _OneDNNLinearMode()
