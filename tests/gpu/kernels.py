"""The kernels that torch.profiler recorded: how long each kind ran, and the gaps between them."""

from collections import Counter
from typing import Any

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

KINDS = {  # by parts of kernels' names, the first that fits
    "attention": ("flash", "flex", "fmha"),
    "matrix products": ("nvjet", "gemm", "cutlass", "splitK", "gemv"),
    "log-probs": ("_reduce_kernel", "_write_grad_kernel", "_scale_rows_kernel"),
    "compiled": ("triton_",),
    "optimizer": ("multi_tensor_apply",),
    "copies": ("Mem",),
}


def is_kernel(event: FunctionEvent) -> bool:
    return event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)


def find_kernels(events: list[FunctionEvent], device: str) -> list[FunctionEvent]:
    """What ran on the device, in order; on the CPU the outermost operations."""
    if device == "cuda":
        kernels = [e for e in events if is_kernel(e)]
    else:
        kernels = [e for e in events if e.cpu_parent is None and e.name.startswith("aten::")]
    return sorted(kernels, key=lambda event: event.time_range.start)


def count_kernels(kernels: list[FunctionEvent], steps: int) -> list[dict[str, Any]]:
    """Number and milliseconds per step of each kernel, the longest first."""
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in kernels:
        times[event.name] += event.time_range.elapsed_us()
        counts[event.name] += 1
    total = sum(times.values()) or 1.0
    return [
        {"name": name, "ms": us / 1e3 / steps, "count": counts[name] / steps, "share": us / total}
        for name, us in times.most_common()
    ]


def add_by_kind(kernels: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds per step of each kind of kernel; what fits none is one of torch's own operations."""
    kinds: Counter[str] = Counter()
    for kernel in kernels:
        fitting = (kind for kind, parts in KINDS.items() if any(part in kernel["name"] for part in parts))
        kinds[next(fitting, "torch's own operations")] += kernel["ms"]
    return dict(kinds.most_common())


def find_gaps(kernels: list[FunctionEvent]) -> tuple[float, list[dict[str, Any]]]:
    """Milliseconds in which a kernel runs, and the gaps between kernels, the longest first."""
    busy, gaps, end, last = 0.0, [], None, ""
    for event in kernels:
        start, stop = event.time_range.start, event.time_range.end
        if end is None or start > end:
            if end is not None:
                gaps.append({"ms": (start - end) / 1e3, "after": last, "before": event.name})
            busy += stop - start
        elif stop > end:
            busy += stop - end
        if end is None or stop > end:
            end, last = stop, event.name
    return busy / 1e3, sorted(gaps, key=lambda gap: -gap["ms"])
