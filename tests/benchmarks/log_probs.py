"""`token_log_probs`, forward and backward: ours against torch.compile, TRL, Liger and cut-cross-entropy.

    python tests/benchmarks/log_probs.py                                   # the shapes below, by device
    python tests/benchmarks/log_probs.py --shape 2048 512 32768 --json log_probs.json
    python tests/benchmarks/log_probs.py --only chunked eager trl --runs 5

Shapes are scored tokens t, width d and vocabulary v: (2048, 512, 32768) and (4096, 1024, 65536) in float32 on
the CPU; (8192, 2048, 128256), (8192, 4096, 128256) and (16384, 896, 151936) in bfloat16 on CUDA.

Each contestant has a process of its own and the same inputs: hidden states, an output head, targets, and
the gradient that a DPO loss hands back. It is measured forward, without gradients; forward and backward with
the head frozen, as LoRA has it; and with the head trained. They run in turns, one run each, so that all see
the same good and bad minutes of the machine.

Time: the median (and the best) of several runs after one that warms up. The first run is shown beside them:
it includes compiling, with nothing compiled found in a cache.

Peak memory: what a further run needs beyond its inputs; log-probs and gradients count. On CUDA it is
torch.cuda.max_memory_allocated less what was allocated before; else the peak of the process's resident memory
(VmHWM, which writing 5 to /proc/self/clear_refs resets; Linux only) less VmRSS from before, when memory that
is no longer used has been handed back to the system.

Floor: the time of the matrix products alone, each of 2*t*d*v FLOPs: 1 forward, 2 with the head frozen, 3 with
it trained, at the rate of torch.mm, measured before and after each run in the same process, on up to 2048
tokens and 16,384 words. Where `dpo_wrapper.cpu_matmul.matmul` is faster than torch.mm (on some processors
oneDNN is), ours may exceed 100%.

Errors: the largest of 16 tokens, relative to float64: of log-probs, and of gradients of hidden states. The
likelier a token, the smaller are both, and the more is lost by subtracting two numbers that are nearly equal.
The JSON has the largest error in nats, too.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import add_running, in_turns, take_turns, why_not, write_json

SHAPES = {
    "cpu": [(2048, 512, 32768), (4096, 1024, 65536)],
    "cuda": [(8192, 2048, 128256), (8192, 4096, 128256), (16384, 896, 151936)],
}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
NAMES = {
    "triton": "dpo_wrapper, triton",
    "chunked": "dpo_wrapper, chunked",
    "fused": "dpo_wrapper, fused loss",
    "eager": "dpo_wrapper, eager",
    "compile": "torch.compile of eager's lines",
    "trl": "TRL ChunkedLogProbFunction",
    "liger": "Liger LigerFusedLinearDPOLoss *",
    "cce": "cut-cross-entropy, cce",
    "cce-compile": "cut-cross-entropy, torch_compile",
}
MODES = {
    "forward": "forward",
    "frozen": "forward and backward, head frozen",
    "trained": "forward and backward, head trained",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=list(SHAPES), default=here, help="default, here: %(default)s")
    parser.add_argument(
        "--shape", nargs=3, type=int, action="append", metavar=("T", "D", "V"), help="may be given repeatedly"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: by device")
    parser.add_argument("--only", nargs="+", choices=list(NAMES), help="these contestants")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs; default: %(default)s")
    add_running(parser, runs=5)
    parser.add_argument("--contestant", choices=list(NAMES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.shape = args.shape or SHAPES[args.device]
    args.dtype = args.dtype or DTYPES[args.device]
    for t, d, v in args.shape:
        if t < 2 or t % 2 or d < 1 or v < 2:
            parser.error(f"--shape should have an even number of tokens, but it is {t} {d} {v}")
    return args


def run_contestants(
    names: list[str], shape: tuple[int, int, int], args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """The results of each by mode, or `missing` or `failed` with the reason."""
    copied = ("device", "dtype", "runs", "threads", "seed")
    env = {"HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    return take_turns(Path(__file__), names, args, copied, "--shape", *map(str, shape), **env)


def cells(of_mode: dict[str, Any], ours: dict[str, Any] | None) -> str:
    """The figures of one line, beside those of ours."""
    seconds, peak = of_mode["seconds"], of_mode["peak_mb"]
    slower = f"{seconds / ours['seconds']:.2f}" if ours else ""
    heavier = f"{peak / ours['peak_mb']:.2f}" if ours and peak and ours["peak_mb"] else ""
    shown = "unknown" if peak is None else f"{peak:.0f}"
    log_probs, grad = (
        f"{of_mode[key]:.1e}" if key in of_mode else "" for key in ("log_prob_error", "grad_error")
    )
    return (
        f"{seconds:>9.4f} {min(of_mode['runs']):>9.4f} {slower:>6} {shown:>8} {heavier:>6} "
        f"{of_mode['floor_seconds']:>8.4f} {of_mode['share_of_floor']:>8.0%} {log_probs:>9} {grad:>9} "
        f"{of_mode['first_seconds']:>7.1f}"
    )


def report(results: dict[str, dict[str, Any]], modes: Sequence[str] = tuple(MODES)) -> None:
    """Print a table for each mode, and what is to be said of its lines."""
    head = "  seconds      best  ratio  peak MB  ratio    floor of floor  log-prob  gradient   first"
    for mode in modes:
        print(f"\n{MODES[mode]:<35} {head}")
        lines = {name: result.get("modes", {}).get(mode, result) for name, result in results.items()}
        ours = next((lines[n] for n in ("fused", "triton", "chunked") if "seconds" in lines.get(n, {})), None)
        for name, line in lines.items():
            print(f"{NAMES[name]:<35} {cells(line, ours) if 'seconds' in line else why_not(line)}")
    ran = [result for result in results.values() if "modes" in result]
    if "modes" in results.get("liger", {}):
        pairs = f"pairs of {results['liger']['sequence']} tokens a side"
        print(f"\n* a whole DPO loss without reference, of {pairs}, with its gradients made in its forward;")
        print("  of log-probs it hands out sums")
    products = [result["product_rate"] for result in ran if "product_rate" in result]
    if products:
        rates = sorted(m["gemm_rate"] for r in ran for m in r["modes"].values() if "seconds" in m)
        mm = (
            f"; torch.mm at {median(rates) / 1e9:.1f} ({rates[0] / 1e9:.1f} to {rates[-1] / 1e9:.1f})"
            if rates
            else ""
        )
        print(f"\ndpo_wrapper.cpu_matmul.matmul multiplies at {median(products) / 1e9:.1f} GFLOP/s{mm}")


def failed(result: dict[str, Any]) -> bool:
    return "failed" in result or any("failed" in of_mode for of_mode in result.get("modes", {}).values())


def main() -> int:
    args = parse()
    if args.contestant:
        import json

        from log_prob_contestants import measure

        print(json.dumps(in_turns(measure(args))))
        return 0
    names = args.only or [name for name in NAMES if name != "triton" or args.device == "cuda"]
    shapes = []
    for t, d, v in args.shape:
        print(f"\n{t:,} tokens, width {d:,}, vocabulary {v:,}, {args.dtype} on {args.device}", end="")
        print(f", {args.threads} threads" if args.device == "cpu" else "", flush=True)
        results = run_contestants(names, (t, d, v), args)
        report(results)
        shapes.append({"shape": [t, d, v], "results": results})
        if args.json:
            write_json(args, shapes=shapes)
    return 1 if any(failed(result) for shape in shapes for result in shape["results"].values()) else 0  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
