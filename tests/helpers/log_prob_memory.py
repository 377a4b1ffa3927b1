"""Peak memory of `token_log_probs`, forward and backward, each time in a process of its own.

    echo eager|cached|recomputed|frozen|default|fused|uneven T D V | python log_prob_memory.py

All but `eager` use `impl = 'chunked'`. The head trains except under `frozen`. All softmaxes are cached, or
none (`recomputed`), or as many as fit into the budget (`default`). With a fused loss there are eight groups
of equal size (`fused`), or one of 8/9 of the tokens and one of the rest (`uneven`).

Prints a line of JSON for each line that it reads, from a process that it forks. `extra` are the bytes that
this process needed beyond its inputs: the peak of its resident memory, less the resident memory when all
libraries were loaded and the inputs were written.
"""

import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import torch

from dpo_wrapper import token_log_probs
from dpo_wrapper.log_probs import FusedLoss
from dpo_wrapper.log_probs.softmax_cache import SoftmaxCache


def read_status(name: str) -> int:
    """One line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def reset_peak() -> tuple[str, int]:
    """Reset the peak if the system can. Returns how to read the peak, and the memory in use now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return "VmHWM", read_status("VmRSS")
    except OSError:
        return "ru_maxrss", read_peak("ru_maxrss")


def read_peak(method: str) -> int:
    if method == "VmHWM":
        return read_status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forward_and_backward(mode: str, t: int, d: int, v: int) -> dict[str, str | int | float]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(t, d, generator=generator).requires_grad_()
    weight = (torch.randn(v, d, generator=generator) / d**0.5).requires_grad_(mode != "frozen")
    targets = torch.randint(0, v, (t,), generator=generator)

    trained = [x for x in (hidden, weight) if x.requires_grad]
    impl = "eager" if mode == "eager" else "chunked"
    groups = {"fused": torch.arange(t) * 8 // t, "uneven": torch.arange(t) * 9 // (8 * t)}
    fused_loss = FusedLoss(torch.sum, groups[mode]) if mode in groups else None
    if mode in ("cached", "recomputed"):
        SoftmaxCache.budget = lambda tiles: 2**40 if mode == "cached" else 0

    method, before = reset_peak()
    start = time.perf_counter()
    scores = token_log_probs(hidden, weight, targets, impl=impl, fused_loss=fused_loss)
    grads = torch.autograd.grad(scores.sum(), trained)
    seconds, extra = time.perf_counter() - start, read_peak(method) - before
    assert all(grad.isfinite().all() for grad in grads)
    return {"mode": mode, "extra": extra, "method": method, "seconds": round(seconds, 2)}


def measure(mode: str, *sizes: str) -> None:
    torch.set_num_threads(1)
    t, d, v = map(int, sizes)
    forward_and_backward(mode, 64, 64, 64)  # loads what is loaded lazily
    print(json.dumps(forward_and_backward(mode, t, d, v) | {"t": t, "d": d, "v": v}), flush=True)


if __name__ == "__main__":
    for line in sys.stdin:
        process = multiprocessing.get_context("fork").Process(target=measure, args=line.split())
        process.start()
        process.join()
        assert process.exitcode == 0
