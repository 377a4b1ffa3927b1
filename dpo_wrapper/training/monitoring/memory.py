"""How much memory a process has needed."""

import sys

import torch


def measure_peak_memory(device: torch.device) -> float:
    """The most memory that this process has held so far, in GB (1e9 bytes).

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
