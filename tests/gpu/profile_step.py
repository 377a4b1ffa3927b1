"""Where the time of our training step goes: kernels, waits for the device, and gaps in which no kernel runs.

    python tests/gpu/profile_step.py --json profile.json           # 0.5b full hh 64, and 1.5b lora en 16
    python tests/gpu/profile_step.py --case 1.5b full hh 32 --contestant tree-compiled-layers
    python tests/gpu/profile_step.py --device cpu --toy

Cases and contestants are those of train_step.py. Kernels and waits are per step, as torch.profiler records
them. It slows the processor's side down, so that the share of gaps is computed from the time of steps that
were not profiled: 1 - (time in which a kernel runs) / (time of a step). In a row, steps are launched without
waiting in between, as in a training loop; the processor's time is until the last one is launched. Places
are lines of code that waited for the device in one more step, as torch.cuda.set_sync_debug_mode warns of
them. On the CPU, the outermost operations stand for kernels, and places are those of operations that would
wait on CUDA, as far as torch dispatches them.
"""

import argparse
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from contestants import Step
from kernels import add_by_kind, count_kernels, find_gaps, find_kernels
from measure import ROOT, UnavailableError, add_running, timed
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from train_step import NAMES
from training_case import Case, Setup, add_case_options, run_cases, set_up

CASES = [Case("0.5b", "full", "hh", 64), Case("1.5b", "lora", "en", 16)]
OURS = [name for name in NAMES if not name.startswith("trl")]
MAX_KERNELS, MAX_GAPS, MAX_PLACES = 25, 10, 25
WAITS = (
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaDeviceSynchronize",
    "cudaMemcpy",
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "Memcpy DtoH (Device -> Pageable)",
    "Memcpy DtoH (Device -> Pinned)",
)
"""What the profiler calls waits for the device, and the operations that cause them."""


# what the profiler records


def record_steps(setup: Setup, forward: Step, steps: int) -> list[FunctionEvent]:
    activities = [ProfilerActivity.CPU]
    if setup.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            setup.train_step(forward)
        if setup.device == "cuda":
            torch.cuda.synchronize()
    return list(profiler.events())


def count_waits(events: list[FunctionEvent], steps: int) -> dict[str, dict[str, float]]:
    """By name, number and milliseconds per step."""
    waits = {}
    for name in WAITS:
        durations = [event.time_range.elapsed_us() for event in events if event.name == name]
        if durations:
            waits[name] = {"count": len(durations) / steps, "ms": sum(durations) / 1e3 / steps}
    return waits


# where code waits


def describe_place() -> tuple[str, str]:
    """The innermost line of this project's package, and the innermost line of all, outside this file."""
    frames = [f for f in traceback.extract_stack() if f.filename not in (__file__, warnings.__file__)]
    frames = [f for f in frames if not f.filename.endswith(("_python_dispatch.py", "eval_frame.py"))]
    package = [f for f in frames if "dpo_wrapper" in f.filename and "site-packages" not in f.filename]
    lines = [f"{short_path(f.filename)}:{f.lineno} {f.name}" for f in (*package[-1:], *frames[-1:])]
    return (lines[0], lines[-1]) if lines else ("?", "?")


def short_path(filename: str) -> str:
    if filename.startswith(str(ROOT)):
        return filename[len(str(ROOT)) + 1 :]
    return "/".join(filename.split("/")[-3:])


class WaitingOperations(TorchDispatchMode):
    """Counts, by place, operations whose results' values or sizes the processor needs."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_dim")

    def __init__(self, places: Counter[tuple[str, str]]) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.NAMES:
            self.places[describe_place()] += 1
        return func(*args, **kwargs or {})


@contextmanager
def count_places(device: str) -> Iterator[Counter[tuple[str, str]]]:
    """Within, the places that wait for the device are counted."""
    places: Counter[tuple[str, str]] = Counter()
    if device != "cuda":
        with WaitingOperations(places):
            yield places
        return

    def show(message: Any, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):
            places[describe_place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


# a case


def time_in_a_row(setup: Setup, forward: Step, steps: int) -> dict[str, float]:
    """Milliseconds per step when none is waited for, and of these those until the last one is launched."""
    launched = 0.0

    def launch_steps() -> None:
        nonlocal launched
        began = time.perf_counter()
        for _ in range(steps):
            setup.train_step(forward)
        launched = time.perf_counter() - began

    seconds = timed(launch_steps, setup.device)
    return {"in_a_row_ms": seconds / steps * 1e3, "launched_ms": launched / steps * 1e3}


def profile_case(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    setup = set_up(case, args.device)
    forward = setup.build_forward(args.contestant)
    setup.set_modes(args.contestant)
    for _ in range(2):  # the first probes and compiles, the second fills caches
        setup.train_step(forward)
    runs = [timed(lambda: setup.train_step(forward), args.device) for _ in range(args.runs)]
    in_a_row = time_in_a_row(setup, forward, args.runs)
    events = record_steps(setup, forward, args.runs)
    kernels = find_kernels(events, args.device)
    busy_ms, gaps = find_gaps(kernels)
    counted = count_kernels(kernels, args.runs)
    with count_places(args.device) as places:
        setup.train_step(forward)
    step_ms, busy_ms = statistics.median(runs) * 1e3, busy_ms / args.runs
    profiled_us = kernels[-1].time_range.end - kernels[0].time_range.start if kernels else 0.0
    profiled_ms = profiled_us / 1e3 / args.runs
    return {
        "case": asdict(case),
        "contestant": args.contestant,
        "explain": forward.explain().splitlines(),  # type: ignore[attr-defined]
        "tokens": setup.batch.counts(),
        "step_ms": step_ms,
        **in_a_row,
        "busy_ms": busy_ms,
        "gap_share": 1 - busy_ms / step_ms,
        "profiled_step_ms": profiled_ms,
        "profiled_gap_share": 1 - busy_ms / profiled_ms if profiled_ms else None,
        "kernel_count": len(kernels) / args.runs,
        "kinds": add_by_kind(counted),
        "kernels": counted[:MAX_KERNELS],
        "gaps": gaps[:MAX_GAPS],
        "waits": count_waits(events, args.runs),
        "places": [
            {"count": count, "place": place, "innermost": innermost}
            for (place, innermost), count in places.most_common(MAX_PLACES)
        ],
    }


def report(record: dict[str, Any]) -> None:
    print("\n".join(record["explain"]))
    print(
        f"a step takes {record['step_ms']:.1f} ms; kernels run for {record['busy_ms']:.1f} ms of it: "
        f"{record['gap_share']:.0%} gaps ({record['profiled_gap_share'] or 0:.0%} while profiled)"
    )
    print(f"in a row {record['in_a_row_ms']:.1f} ms, launched in {record['launched_ms']:.1f} ms")
    print(", ".join(f"{kind} {ms:.1f} ms" for kind, ms in record["kinds"].items()))
    print(f"\nkernels, {record['kernel_count']:.0f} a step\n{'ms':>9} {'share':>6} {'count':>8}")
    for kernel in record["kernels"]:
        print(f"{kernel['ms']:>9.3f} {kernel['share']:>6.1%} {kernel['count']:>8.1f}  {kernel['name'][:140]}")
    print(f"\nwaits for the device, a step\n{'count':>9} {'ms':>9}")
    for name, wait in record["waits"].items():
        print(f"{wait['count']:>9.1f} {wait['ms']:>9.3f}  {name}")
    print(f"\nplaces that wait, in one step\n{'count':>9}")
    for place in record["places"]:
        inner = "" if place["innermost"] == place["place"] else f"  (in {place['innermost']})"
        print(f"{place['count']:>9}  {place['place']}{inner}")
    print(f"\nlongest gaps\n{'ms':>9}")
    for gap in record["gaps"]:
        print(f"{gap['ms']:>9.3f}  after {gap['after'][:60]}, before {gap['before'][:60]}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_case_options(parser, "0.5b full hh 64, 1.5b lora en 16")
    parser.add_argument("--contestant", choices=OURS, default="tree", help="as in train_step.py")
    add_running(parser, runs=3)
    return parser.parse_args()


def run_case(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The record of a case, or `missing` or `failed` with the reason; reported."""
    try:
        record = profile_case(case, args)
        report(record)
    except UnavailableError as error:
        print(error)
        return {"case": asdict(case), "missing": str(error)}
    except Exception as error:  # of whatever kind: another case may do
        traceback.print_exc()
        return {"case": asdict(case), "failed": f"{type(error).__name__}: {error}"[:300]}
    return record


def main() -> int:
    records = run_cases(parse(), CASES, run_case)
    return 1 if any("failed" in record for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
