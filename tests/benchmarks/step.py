"""One DPO training step (forward and backward, no optimizer): ours against TRL and x-transformers.

    python tests/benchmarks/step.py                              # lengths of hh_harmless, 8 pairs, a Llama
    python tests/benchmarks/step.py --shape en --pairs 4 --json en.json
    python tests/benchmarks/step.py --model xt                   # against x-transformers' own DPO
    python tests/benchmarks/step.py --model qwen3.5              # a hybrid, also against a Llama of its sizes

Each contestant has a process of its own, the same weights and the same tokens. They run in turns, one step
each, so that all see the same good and bad minutes of the machine.

Time: the median (and the best) of several runs after one that warms up. Ours includes building its
tree from padded rows; the others' does not include their collators.

Peak memory: what the process needed during a step beyond what it held with its models built; gradients count.
It is the peak of its resident memory (VmHWM, which writing 5 to /proc/self/clear_refs resets before each
step; Linux only) less VmRSS from before the first step.

Floor: the time of the step's matrix products alone, if every unique token is computed once (policy forward,
twice that backward, reference forward; linear layers, the causal half of both attention products, and the
head where something is scored, but not the recurrences of a hybrid), at the rate at which this machine
multiplies float32 matrices (4096x512 by 512x2048, same threads, measured before each run): by torch.mm, which
the shares in the table are of, and by `dpo_wrapper.cpu_matmul.matmul`, which is faster on some processors, so
that a share may exceed 100%.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from lengths import SHAPES, VOCAB, Lengths, lengths
from measure import add_running, in_turns, take_turns, why_not, write_json

SEED = 150
"""Of the seeds below 200, the one whose batches of the built-in lengths (8 pairs of hh, 4 of en) are nearest
to the mean of all in padded, real and unique tokens."""

OF_MODEL = {
    "llama": ["tree", "cached", "plain", "trl"],
    "xt": ["tree", "cached", "plain", "x-transformers"],
    "qwen3.5": ["tree", "cached", "plain", "trl", "llama"],
}
NAMES = {
    "tree": "dpo_wrapper, tree",
    "cached": "dpo_wrapper, tree, cached reference",
    "plain": "dpo_wrapper, plain",
    "llama": "dpo_wrapper, tree, a Llama of these sizes",
    "trl": "TRL DPOTrainer.compute_loss",
    "trl-checkpointing": "TRL, with gradient checkpointing (its default)",
    "x-transformers": "x-transformers DPO",
}


def add_sizes(parser: argparse.ArgumentParser, dim: int, depth: int, vocab: int, runs: int) -> None:
    """Options that step.py and growth.py share."""
    parser.add_argument("--data", type=Path, metavar="FILE", help="take lengths from a file of pairs")
    parser.add_argument("--model", choices=list(OF_MODEL), default="llama", help="default: %(default)s")
    parser.add_argument("--dim", type=int, default=dim, help="a multiple of 64; default: %(default)s")
    parser.add_argument("--depth", type=int, default=depth, help="layers; default: %(default)s")
    parser.add_argument("--vocab", type=int, default=vocab, help="default: %(default)s")
    add_running(parser, runs)
    parser.add_argument(
        "--seed", type=int, default=SEED, help="picks pairs, ids and weights; default: %(default)s"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = ", ".join(f"{shape} ({pairs})" for shape, pairs in SHAPES.items())
    parser.add_argument("--shape", choices=list(SHAPES), default="hh", help="lengths; default: %(default)s")
    parser.add_argument("--pairs", type=int, help=f"default, by shape: {shapes}")
    add_sizes(parser, dim=512, depth=8, vocab=VOCAB, runs=5)
    parser.add_argument(
        "--only", nargs="+", choices=list(NAMES), help="these contestants, instead of those of the model"
    )
    parser.add_argument("--contestant", choices=list(NAMES), help=argparse.SUPPRESS)
    parser.add_argument("--lengths", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_contestants(names: list[str], args: argparse.Namespace, of: Lengths) -> dict[str, dict[str, Any]]:
    """The results of each, or `missing` or `failed` with the reason."""
    copied = ("model", "dim", "depth", "vocab", "runs", "threads", "seed")
    more = ("--lengths", json.dumps([of.system, of.pairs]))
    script = Path(__file__).with_name("step.py")
    return take_turns(script, names, args, copied, *more, HF_HUB_OFFLINE="1")


def passes(name: str) -> int:
    """Forward passes' worth of matrix products: policy, twice that backward, and the reference."""
    return 3 if name == "cached" else 4


def report(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Print the table; adds the share of the floor to the results."""
    ran = {name: result for name, result in results.items() if "seconds" in result}
    if not ran:
        for name, result in results.items():
            print(f"{NAMES[name]}: {why_not(result)}")
        return {}
    first = next(iter(ran.values()))
    rate, fast = (
        statistics.median(r for result in ran.values() for r in result[rates])
        for rates in ("gemm_rates", "product_rates")
    )
    forward = first["forward_flops"]
    total = 4 * sum(forward.values())
    floor = {"gemm_rate": rate, "product_rate": fast, **{k: v * 4 for k, v in forward.items()}}
    floor |= {"seconds": total / rate, "product_seconds": total / fast}

    tokens = first["tokens"]
    print(f"tokens: {tokens['padded']:,} padded, {tokens['real']:,} real, {tokens['unique']:,} unique\n")
    head = ("", "seconds", "best", "ratio", "peak MB", "ratio", "gradient norm", "of floor")
    print("{:<46} {:>8} {:>8} {:>6} {:>8} {:>6} {:>13} {:>9}".format(*head))
    tree = ran.get("tree", {})
    for name, result in results.items():
        if name not in ran:
            print(f"{NAMES[name]:<46} {why_not(result)}")
            continue
        seconds, peak = result["seconds"], result["peak_mb"]
        result["share_of_floor"] = passes(name) * sum(result["forward_flops"].values()) / rate / seconds
        slower = f"{seconds / tree['seconds']:.2f}" if tree else ""
        heavier = f"{peak / tree['peak_mb']:.2f}" if tree and peak else ""
        shown = "unknown" if peak is None else f"{peak:.0f}"
        times = f"{seconds:>8.3f} {min(result['runs']):>8.3f} {slower:>6}"
        rest = f"{result['gradient_norm']:>13.6g} {result['share_of_floor']:>9.0%}"
        print(f"{NAMES[name]:<46} {times} {shown:>8} {heavier:>6} {rest}")
    parts = ", ".join(f"{name} {4 * flops / total:.0%}" for name, flops in forward.items())
    cached = passes("cached") / 4
    print(
        f"\nfloor: {total / 1e9:.0f} GFLOP ({parts}) at {rate / 1e9:.1f} GFLOP/s: {floor['seconds']:.3f} s; "
        f"{floor['seconds'] * cached:.3f} s with a cached reference"
    )
    print(
        f"at {fast / 1e9:.1f} GFLOP/s by dpo_wrapper.cpu_matmul.matmul: {floor['product_seconds']:.3f} s; "
        f"{floor['product_seconds'] * cached:.3f} s with a cached reference"
    )
    return floor


def main() -> int:
    args = parse()
    if args.contestant:
        from contestants import measure

        system, pairs = json.loads(args.lengths)
        stretches = measure(args, Lengths(system, [tuple(pair) for pair in pairs]))
        print(json.dumps(in_turns(stretches)))
        return 0
    of = lengths(args.shape, args.pairs, args.seed, args.data)
    source = args.data or f"{args.shape}, built in"
    print(
        f"{args.model}: width {args.dim}, {args.depth} layers, vocabulary {args.vocab:,}, float32; ", end=""
    )
    print(f"{len(of.pairs)} pairs ({source}), seed {args.seed}, {args.threads} threads", flush=True)
    names = args.only or OF_MODEL[args.model]
    results = run_contestants(names, args, of)
    floor = report(results)
    if args.json:
        write_json(args, lengths=[of.system, of.pairs], floor=floor, results=results)
    return 1 if any("failed" in result for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
