"""An accelerator on paper: the gather on meta tensors, with its launches and its memory counted.

Meta tensors have shapes and dtypes, but no numbers, so that a shape of any size runs on any machine, and
whatever has to wait for a number raises.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_wrapper import token_log_probs
from dpo_wrapper.log_probs import FusedLoss, triton_tile
from dpo_wrapper.log_probs.backend import RawTile, ReducedTile
from dpo_wrapper.log_probs.statistics import OnlineSoftmax

PRODUCTS = ("aten.mm.default", "aten.mm.out", "aten.addmm.out", "aten.addmm.dtype_out")


class Ledger(TorchDispatchMode):
    """Counts operations that launch a kernel, FLOPs of products, and the bytes that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.flops = 0
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, str(func)
        if name in PRODUCTS:
            a, b = [x for x in args if isinstance(x, Tensor)][-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        result = kwargs["out"] if name == "aten.addmm.dtype_out" else func(*args, **kwargs)
        if not func.is_view and "empty" not in name and name != "aten.detach.default":
            self.launches[name] += 1
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.add(x)
        return result

    def add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, key, None)
            self.peak = max(self.peak, sum(self.alive.values()))

    def reset(self) -> None:
        self.launches.clear()
        self.flops, self.peak = 0, sum(self.alive.values())


class PaperBackend(triton_tile.TritonBackend):
    """The Triton backend, whose kernels are counted instead of launched."""

    kernels: ClassVar[Counter[str]] = Counter()

    def reduce(self, raw: RawTile, statistics: OnlineSoftmax, *, reference_lse=None, **_: Any) -> ReducedTile:
        self.kernels["read" if reference_lse is None else "read and write"] += 1
        rescale = None if reference_lse is None else torch.empty_like(reference_lse)
        return ReducedTile(raw.product, rescale=rescale)

    def write_grad(self, raw: RawTile, tile_lse: Tensor | None, lse: Tensor, target_grad: Tensor) -> Tensor:
        self.kernels["read and write"] += 1
        return raw.product

    def scale_rows(self, values: Tensor, factor: Tensor) -> None:
        self.kernels["scale"] += 1


@contextmanager
def paper_gpu(free_bytes: int, autocast_dtype: torch.dtype | None = None) -> Iterator[Ledger]:
    """Within, the meta device is an accelerator with so many bytes free and Triton's kernels."""
    PaperBackend.kernels.clear()
    with ExitStack() as stack:
        for target, replacement in {
            "torch.is_autocast_enabled": lambda device: autocast_dtype is not None,
            "torch.get_autocast_dtype": lambda device: autocast_dtype,
            "torch.autocast": lambda *_, **__: nullcontext(),
            "dpo_wrapper.cpu_matmul.can_add_to_float32": lambda device, dtype: True,
            "dpo_wrapper.log_probs.check_in_vocabulary": lambda targets, v: None,
            "dpo_wrapper.log_probs.fused_backward.proportionality": lambda *_: 1.0,
            "dpo_wrapper.log_probs.softmax_cache.free_bytes": lambda device: free_bytes,
            "dpo_wrapper.log_probs.triton_tile.TritonBackend": PaperBackend,
            "dpo_wrapper.log_probs.triton_tile.is_available_on": lambda device: True,
        }.items():
            stack.enter_context(patch(target, replacement))
        yield stack.enter_context(Ledger())


def run_gather(
    t: int,
    d: int,
    v: int,
    free_bytes: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    autocast_dtype: torch.dtype | None = None,
    trains_head: bool = True,
    groups: int | None = None,
) -> dict[str, Any]:
    """Forward and backward: products, kernels and launches, and the peak beside inputs and gradients."""
    with paper_gpu(free_bytes, autocast_dtype) as ledger:
        hidden = torch.empty(t, d, device="meta", dtype=dtype).requires_grad_()
        weight = torch.empty(v, d, device="meta", dtype=dtype).requires_grad_(trains_head)
        targets = torch.empty(t, device="meta", dtype=torch.long)
        fused_loss = None
        if groups is not None:
            fused_loss = FusedLoss(torch.sum, torch.arange(t) * groups // t)
        before = sum(ledger.alive.values())
        ledger.reset()
        scores = token_log_probs(hidden, weight, targets, impl="triton", fused_loss=fused_loss)
        forward, ledger.flops = ledger.flops, 0
        grads = torch.autograd.grad(scores.sum(), [hidden, weight] if trains_head else [hidden])
        grad_bytes = sum(x.numel() * x.itemsize for x in grads)
        return {
            "products": (forward / (2 * t * d * v), ledger.flops / (2 * t * d * v)),
            "kernels": dict(PaperBackend.kernels),
            "launches": Counter(ledger.launches),
            "extra": ledger.peak - before - grad_bytes,
        }
