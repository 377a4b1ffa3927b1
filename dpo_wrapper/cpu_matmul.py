"""float32 matrix products on the CPU by oneDNN, where that is much faster than what torch takes by itself.

torch carries two libraries with such products and takes MKL, which on AMD's processors uses AVX2. Those from
family 26 on (Zen 5) have AVX-512 units of twice that width: there oneDNN is about twice as fast, and the
numbers differ by rounding alone. (On family 25, Zen 4, which does AVX-512 in two halves, both are alike.)
`torch.backends.mkldnn.flags(enabled=False)` turns it off.
"""

import platform
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SMALLEST = 2**25
"""Products of fewer multiplications stay with torch: oneDNN makes a kernel for each new shape, and that takes
about a millisecond."""

WHOLE_AVX512 = 26
"""The first family of AMD's processors with AVX-512 units of 512 bits."""


@lru_cache
def processor() -> str:
    """What the machine says of its processor."""
    described = Path("/proc/cpuinfo")
    return described.read_text() if described.exists() else platform.processor()


@lru_cache
def onednn_is_faster() -> bool:
    """By the kind of machine, not by the clock: the same machine should give the same numbers each time."""
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return False
    family = re.search(r"^cpu family\s*: (\d+)$", processor(), flags=re.MULTILINE)
    if "AuthenticAMD" not in processor() or family is None or int(family[1]) < WHOLE_AVX512:
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).unbind()
    try:
        return torch.allclose(_onednn(a, b), a @ b, atol=1e-4)
    except (AttributeError, RuntimeError):  # it is no public part of torch
        return False


def _onednn(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.T, bias, "none", [], "")


def suits(a: Tensor, b: Tensor, m: int) -> bool:
    """Whether oneDNN should multiply an `m` rows high `a` and `b`, or the transpose of `b`."""
    return (
        a.dtype == b.dtype == torch.float32
        and a.device.type == b.device.type == "cpu"
        and m * b.numel() >= SMALLEST
        and bool(torch.backends.mkldnn.enabled)
        and onednn_is_faster()
    )


def product(
    a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], room: Float[Tensor, "m n"] | None = None
) -> Float[Tensor, "m n"]:
    """`a @ b` for tensors that need no gradient; either may be a transpose.

    `room` is memory that the result may be put into, which spares asking for other; oneDNN takes its own.
    """
    return _onednn(a, b) if suits(a, b, len(a)) else torch.mm(a, b, out=room)


def add_product(total: Float[Tensor, "m n"], a: Float[Tensor, "m k"], b: Float[Tensor, "k n"]) -> None:
    """`total += a @ b`, in one go where the library can."""
    if total.dtype == a.dtype and not suits(a, b, len(a)):
        torch.addmm(total, a, b, out=total)
    else:
        total += product(a, b)


class Linear(torch.autograd.Function):
    """`x @ weight.T + bias`, in any order of derivatives."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "m k"], weight: Float[Tensor, "n k"], bias: Float[Tensor, "n"] | None
    ) -> Float[Tensor, "m n"]:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight.T, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            Linear.apply(grad, weight.T, None) if wants_x else None,
            Linear.apply(grad.T, x.T, None) if wants_weight else None,
            grad.sum(dim=0) if wants_bias else None,
        )


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, by oneDNN where that suits."""
    plain = type(input) is Tensor and type(weight) in (Tensor, nn.Parameter)
    matrices = input.ndim > 1 and weight.ndim == 2
    if (
        not (plain and matrices)
        or not suits(input, weight, input.numel() // max(1, input.shape[-1]))
        or torch.is_autocast_enabled("cpu")
        # checkpointed layers run again in backward, without this: they must save the same tensors then
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    ):
        return F.linear(input, weight, bias)
    return Linear.apply(input.flatten(0, -2), weight, bias).unflatten(0, input.shape[:-1])


class FastProducts(TorchFunctionMode):
    """Within, linear layers on the CPU are computed by `linear`; nothing of a model is changed."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not torch.compiler.is_compiling():
            func = linear
        return func(*args, **(kwargs or {}))
