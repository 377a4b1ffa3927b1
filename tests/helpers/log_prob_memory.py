"""Peak memory of `token_log_probs`, forward and backward, in a process of its own.

    python log_prob_memory.py eager|kept|again|frozen|default|ahead|uneven T D V

All but `eager` are `chunked`: softmaxes are kept or computed again, the head does not train, softmaxes are
kept as far as there is room for them, or the loss is known ahead, for groups of an eighth of the tokens or
for one of 8/9 and one of the rest.

Prints one line of JSON. `extra` is what the process needed beyond its inputs, in bytes: the peak of its
resident memory, less what was resident when everything was loaded and the inputs were there and touched.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch

from dpo_wrapper import token_log_probs
from dpo_wrapper.log_probs import FusedLoss
from dpo_wrapper.log_probs import torch_tile as chunked

THREADS = 2


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def start() -> tuple[str, int]:
    """Forget the peak so far, if the system can; how it will be read, and how much of it is not ours."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return "VmHWM", status("VmRSS")
    except OSError:
        return "ru_maxrss", peak("ru_maxrss")


def peak(method: str) -> int:
    if method == "VmHWM":
        return status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forward_and_backward(way: str, t: int, d: int, v: int) -> dict[str, str | int | float]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(t, d, generator=generator).requires_grad_()
    weight = (torch.randn(v, d, generator=generator) / d**0.5).requires_grad_(way != "frozen")
    targets = torch.randint(0, v, (t,), generator=generator)

    trained = [x for x in (hidden, weight) if x.requires_grad]
    impl = "eager" if way == "eager" else "chunked"
    groups = {"ahead": torch.arange(t) * 8 // t, "uneven": torch.arange(t) * 9 // (8 * t)}
    told = FusedLoss(torch.sum, groups[way]) if way in groups else None
    if way in ("kept", "again"):
        chunked.keep_bytes = lambda weight: 2**40 if way == "kept" else 0

    method, before = start()
    began = time.perf_counter()
    scores = token_log_probs(hidden, weight, targets, impl=impl, fused_loss=told)
    grads = torch.autograd.grad(scores.sum(), trained)
    seconds, extra = time.perf_counter() - began, peak(method) - before
    assert all(grad.isfinite().all() for grad in grads)
    return {"way": way, "extra": extra, "method": method, "seconds": round(seconds, 2)}


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    way, *sizes = sys.argv[1:]
    t, d, v = map(int, sizes)
    forward_and_backward(way, 64, 64, 64)  # loads what is loaded late
    print(json.dumps(forward_and_backward(way, t, d, v) | {"t": t, "d": d, "v": v}))
