"""How much memory a process holds, and has needed."""

import sys
from contextlib import suppress
from pathlib import Path

import torch


def measure_peak_memory(device: torch.device) -> float:
    """The most memory that this process has held so far, or since `reset_peak_memory`, in GB (1e9 bytes).

    On CUDA that is what torch has allocated there, elsewhere the main memory of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e9
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9  # Linux counts in KiB


def measure_held_memory(device: torch.device) -> float:
    """The memory that this process holds now, in GB; of the same kind as `measure_peak_memory`."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e9
    import psutil

    return psutil.Process().memory_info().rss / 1e9


def reset_peak_memory(device: torch.device) -> None:
    """Measure the peak from now on, where the system can: on CUDA, and on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
