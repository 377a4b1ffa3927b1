"""What the benchmarks share: processes of contestants, their memory, and the rate of matrix products."""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]


class UnavailableError(Exception):
    """A contestant is not installed, or cannot run on this machine."""


# processes


def environment(threads: int) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}


def result_of(status: int, last: str, errors: str) -> dict[str, Any]:
    """The JSON of the last line that a process printed, or `failed` with the reason."""
    if status:
        lines = errors.strip().splitlines() or [f"exit status {status}"]
        return {"failed": lines[-1] if status > 0 else f"ended by signal {-status}"}
    return json.loads(last)


TURN = "your turn?"
"""What a contestant prints when it is ready for its next stretch of work; an empty line says go."""


def take_turns(
    script: Path, names: list[str], args: argparse.Namespace, copied: Sequence[str], *more: str, **env: str
) -> dict[str, dict[str, Any]]:
    """The JSON that the script prints last as each contestant, by name, or `failed` with the reason.

    It gets the options of `args` that are to be `copied`, and `more`. Contestants work in turns, each and
    then each again, so that all see the same good and bad minutes of the machine, and one works at a time.
    """
    options = [f"--{option}={getattr(args, option)}" for option in copied]
    results: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        running = {}
        for name in names:
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            running[name] = (
                stack.enter_context(
                    subprocess.Popen(
                        [sys.executable, str(script), "--contestant", name, *options, *more],
                        env=environment(args.threads) | env,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                    )
                ),
                errors,
            )
        while running:
            for name, (process, errors) in list(running.items()):
                line = work(process)
                if line != TURN:
                    errors.seek(0)
                    results[name] = result_of(process.wait(), line, errors.read())
                    del running[name]
    return {name: results[name] for name in names}


def work(process: Any) -> str:
    """Let it go on; what it prints when it stops again, `TURN` or something else at its end."""
    last = ""
    try:
        process.stdin.write("\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended already
    for line in process.stdout:
        last = line.strip() or last
        if last == TURN:
            return last
    return last


def in_turns(stretches: Iterator[Any]) -> Any:
    """In a contestant: one stretch of work at a time, whenever it is its turn; what the last one returns."""
    while True:
        input()
        try:
            next(stretches)
        except StopIteration as stop:
            return stop.value
        print(TURN, flush=True)


def why_not(result: dict[str, Any]) -> str:
    """In place of the figures of a contestant that has none."""
    return result.get("missing") or f"failed: {result['failed']}"


def add_running(parser: argparse.ArgumentParser, runs: int) -> None:
    """Options that all benchmarks have."""
    parser.add_argument("--runs", type=int, default=runs, help="after one warm-up; default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")


def write_json(args: argparse.Namespace, **content: Any) -> None:
    """The results, with the settings and the machine that they are from."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    machine = {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "processor": processor_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        machine["gpu"] = torch.cuda.get_device_name()
        machine["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        machine["triton"] = version("triton")
    args.json.write_text(json.dumps({"settings": settings, "machine": machine} | content, indent=1) + "\n")


def processor_name() -> dict[str, str]:
    """What Linux says of the kind of processor; the instructions that torch uses there."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    said = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    told = {key.strip(): value.strip() for key, value in said.items()}
    kind = {key: told[key] for key in ("model name", "cpu family", "model") if key in told}
    return kind | {"instructions": torch.backends.cpu.get_cpu_capability()}


# memory


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def can_weigh() -> bool:
    try:
        forget_peak()
    except OSError:
        return False
    return True


def tidy() -> None:
    """Hand back to the system what is no longer used, so that it shows again where it is needed again."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
        if trim is not None:
            trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# time


def timed(function: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of one call."""
    if device != "cuda":
        began = time.perf_counter()
        function()
        return time.perf_counter() - began
    torch.cuda.synchronize()
    began_at, ended_at = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began_at.record()
    function()
    ended_at.record()
    torch.cuda.synchronize()
    return began_at.elapsed_time(ended_at) / 1e3


def gemm_rate(
    m: int = 4096,
    k: int = 512,
    n: int = 2048,
    *,
    multiply: Callable[[Tensor, Tensor], Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    repeats: int = 5,
) -> float:
    """FLOP/s of a product of [m, k] and [k, n], by `torch.mm` or another: the median of several."""
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
    out = torch.empty(m, n, dtype=dtype, device=device)
    once = (lambda: torch.mm(a, b, out=out)) if multiply is None else (lambda: multiply(a, b))
    return 2 * m * k * n / statistics.median(timed(once, device) for _ in range(repeats))
