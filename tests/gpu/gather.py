"""`token_log_probs` of real shapes, forward and backward: ours against four other libraries.

    python tests/gpu/gather.py --json gather.json                          # the shapes below, in order
    python tests/gpu/gather.py --shape 8192 2048 128256 --only triton cce
    python tests/gpu/gather.py --device cpu --toy

As in `tests/benchmarks/log_probs.py`, whose contestants, measures and table these are. But the contestants of
a shape share one process and its inputs, which saves starting them, and there is no forward pass by itself.
Out of memory is a result. After an error by which CUDA answers no more the run ends; it has written what was
measured before.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from log_prob_contestants import CONTESTANTS, Contestant, Scales, one_mode, tried
from measure import UnavailableError, add_running, gemm_rate, tidy, write_json
from zipf_inputs import draw, truth

from log_probs import DTYPES, NAMES, report

SHAPES = [(8192, 2048, 128256), (16384, 2048, 248320), (16384, 896, 151936)]
DEFAULT_NAMES = ["fused", "triton", "trl", "liger", "cce", "compile"]
TOY_SHAPES = [(24, 16, 300)]
TOY_NAMES = ["fused", "chunked", "trl", "liger", "cce"]
MODES = ("frozen", "trained")
Results = dict[str, dict[str, Any]]


def build_contestants(names: list[str], device: str) -> tuple[dict[str, Contestant], Results]:
    """Those that are installed, and of the others the reason why there is no result."""
    built: dict[str, Contestant] = {}
    results: Results = {}
    for name in names:
        try:
            built[name] = CONTESTANTS[name](device)
            results[name] = {"modes": {}}
        except UnavailableError as error:
            results[name] = {"missing": str(error)}
    return built, results


def measure_shape(shape: tuple[int, int, int], args: argparse.Namespace) -> Iterator[Results]:
    """The results of each contestant by mode, or `missing` or `failed` with the reason, after each mode.

    Contestants run in turns.
    """
    torch.compiler.reset()  # or the second shape would compile for shapes of any size
    dtype = getattr(torch, args.dtype)
    built, results = build_contestants(args.only, args.device)
    inputs = draw(*shape, dtype, args.device, args.seed)
    true, scales = truth(inputs), Scales(args.device)
    tidy()
    t, d, v = shape
    rate = partial(gemm_rate, min(t, 2048), d, min(v, 16384), dtype=dtype, device=args.device, repeats=3)
    for mode in MODES:
        stretches = args.runs + 2
        running = {
            name: tried(one_mode(mode, run, inputs, true, scales, args.runs, rate), stretches)
            for name, run in built.items()
        }
        for _ in range(stretches):
            for name, of_mode in running.items():
                had_failed = "failed" in results[name]["modes"].get(mode, {})
                results[name]["modes"][mode] = next(of_mode)
                if "failed" in results[name]["modes"][mode] and not had_failed:
                    tidy()
                    if args.device == "cuda":
                        torch.cuda.synchronize()  # raises where the device answers no more
        for name in built:
            results[name]["sequence"] = inputs.sequence
        yield results


def has_failed(shape: dict[str, Any]) -> bool:
    """Whether a contestant failed for another reason than lack of memory, which is a result."""
    results = shape.get("results", {}).values()
    reasons = [mode.get("failed") for result in results for mode in result.get("modes", {}).values()]
    return any(reason and not reason.startswith("OutOfMemoryError") for reason in reasons)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=list(DTYPES), default=here, help="default, here: %(default)s")
    parser.add_argument("--toy", action="store_true", help="a tiny shape, which measures nothing")
    parser.add_argument(
        "--shape", nargs=3, type=int, action="append", metavar=("T", "D", "V"), help="may be given repeatedly"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: by device")
    parser.add_argument("--only", nargs="+", choices=list(NAMES), help="these contestants")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs; default: %(default)s")
    parser.add_argument("--seconds", type=float, help="begin no other shape after so many")
    add_running(parser, runs=5)
    args = parser.parse_args()
    args.shape = args.shape or (TOY_SHAPES if args.toy else SHAPES)
    args.only = args.only or (TOY_NAMES if args.toy else DEFAULT_NAMES)
    args.dtype = args.dtype or DTYPES[args.device]
    return args


def main() -> int:
    began, args = time.monotonic(), parse()
    torch.set_num_threads(args.threads)
    shapes: list[dict[str, Any]] = []
    for t, d, v in args.shape:
        print(f"\n{t:,} tokens, width {d:,}, vocabulary {v:,}, {args.dtype} on {args.device}", flush=True)
        if args.seconds and time.monotonic() - began > args.seconds:
            shapes.append({"shape": [t, d, v], "left_out": "no time"})
            print("no time")
        else:
            shapes.append({"shape": [t, d, v]})
            for results in measure_shape((t, d, v), args):
                shapes[-1]["results"] = results
                if args.json:
                    write_json(args, shapes=shapes)
            report(shapes[-1]["results"], MODES)
            tidy()
        if args.json:
            write_json(args, shapes=shapes)
    return 1 if any(map(has_failed, shapes)) else 0


if __name__ == "__main__":
    sys.exit(main())
