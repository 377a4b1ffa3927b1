"""Seconds and peak memory of a training step against the number of pairs: 1, 2, 4, ... 64.

    python tests/benchmarks/growth.py
    python tests/benchmarks/growth.py --shape system-prompt --json growth.json

Measured as in step.py, each point in a process of its own, with a smaller model so that all of it ends in a
few minutes. A batch holds the pairs of all smaller ones. The exponent is the slope of log seconds over log
tokens: 1 is linear. A step's fixed costs (gradients of all weights, the launch of each operation) flatten it
where batches are small, so it is also fitted over the larger half of them, and memory is fitted by a line.
"""

import argparse
import math
import sys
from typing import Any

from lengths import SHAPES, lengths
from measure import why_not, write_json
from step import NAMES, add_sizes, run_contestants


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="hh", help="lengths; default: %(default)s")
    parser.add_argument("--most", type=int, default=64, help="pairs of the last point; default: %(default)s")
    parser.add_argument(
        "--only", nargs="+", choices=list(NAMES), default=["tree", "plain"], help="default: tree plain"
    )
    add_sizes(parser, dim=256, depth=2, vocab=4096, runs=3)
    return parser.parse_args()


def line(x: list[float], y: list[float]) -> tuple[float, float]:
    """Slope and intercept of least squares."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    slope /= sum((a - mean_x) ** 2 for a in x)
    return slope, mean_y - slope * mean_x


def exponent(points: list[dict[str, Any]], tokens: str) -> float:
    x = [math.log(point["tokens"][tokens]) for point in points]
    return line(x, [math.log(point["seconds"]) for point in points])[0]


def fits(points: list[dict[str, Any]]) -> dict[str, float]:
    """Of the points of one contestant, smallest first."""
    half = points[len(points) // 2 :]
    found = {}
    for tokens in ("unique", "padded"):
        found[f"exponent_{tokens}"] = exponent(points, tokens)
        found[f"exponent_{tokens}_larger_half"] = exponent(half, tokens)
    if all(point["peak_mb"] is not None for point in points):
        unique = [float(point["tokens"]["unique"]) for point in points]
        slope, intercept = line(unique, [point["peak_mb"] for point in points])
        found |= {"kb_per_unique_token": slope * 1e3, "mb_at_none": intercept}
    return found


def main() -> int:
    args = parse()
    counts = [2**k for k in range(args.most.bit_length()) if 2**k <= args.most]
    print(
        f"{args.model}: width {args.dim}, {args.depth} layers, vocabulary {args.vocab:,}, float32; ", end=""
    )
    print(f"{args.data or args.shape}, seed {args.seed}, {args.threads} threads\n")
    head = ("", "pairs", "padded", "real", "unique", "seconds", "peak MB", "us/unique")
    print("{:<6} {:>6} {:>8} {:>8} {:>8} {:>8} {:>8} {:>10}".format(*head))
    points: dict[str, list[dict[str, Any]]] = {name: [] for name in args.only}
    failed = False
    for pairs in counts:
        of = lengths(args.shape, pairs, args.seed, args.data)
        for name, result in run_contestants(args.only, args, of).items():
            if "seconds" not in result:
                failed = failed or "failed" in result
                print(f"{name:<6} {pairs:>6} {why_not(result)}")
                continue
            points[name].append({"pairs": pairs} | result)
            tokens, seconds = result["tokens"], result["seconds"]
            peak = "unknown" if result["peak_mb"] is None else f"{result['peak_mb']:.0f}"
            print(
                f"{name:<6} {pairs:>6} {tokens['padded']:>8,} {tokens['real']:>8,} {tokens['unique']:>8,} "
                f"{seconds:>8.3f} {peak:>8} {seconds / tokens['unique'] * 1e6:>10.1f}",
                flush=True,
            )
    fitted = {name: fits(of_name) for name, of_name in points.items() if len(of_name) > 2}
    for name, of_name in fitted.items():
        print(f"\n{NAMES[name]}")
        for tokens in ("unique", "padded"):
            whole, half = of_name[f"exponent_{tokens}"], of_name[f"exponent_{tokens}_larger_half"]
            print(
                f"  seconds ~ ({tokens} tokens)^{whole:.2f}; over the larger half of the batches, ^{half:.2f}"
            )
        if "mb_at_none" in of_name:
            slope, intercept = of_name["kb_per_unique_token"], of_name["mb_at_none"]
            print(f"  peak memory ~ {intercept:.0f} MB + {slope:.1f} kB a unique token")
    if args.json:
        write_json(args, points=points, fits=fitted)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
