"""One DPO step of a Llama with LoRA in its upper layers alone: lower layers computed once, or in both passes.

    python tests/benchmarks/lower_layers.py
    python tests/benchmarks/lower_layers.py --adapted 2 --depth 12 --json lower_layers.json

The reference is the policy with its adapter off, so that both passes run the same lower layers over the same
tokens. `once` is what `DPO` does; `whole` computes them in the policy's pass as well. Measured as in step.py:
a process for each, in turns, forward and backward, medians after a run that warms up. Of a forward pass
without the head, the reference needs all, the policy the share of the adapted layers, and its backward pass
about that share again; so `once` should need (1 + 2 s) / (2 + s) of the time of `whole` for a share s, less
what the head needs in both.
"""

import argparse
import json
import sys
from pathlib import Path
from unittest import mock

from lengths import SHAPES, Lengths, lengths
from measure import add_running, in_turns, take_turns, why_not, write_json
from step import SEED
from torch import Tensor, nn

NAMES = {"once": "lower layers once for both", "whole": "lower layers in both passes"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="hh", help="lengths; default: %(default)s")
    parser.add_argument("--pairs", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--adapted", type=int, help="upper layers with an adapter; default: a third")
    parser.add_argument("--data", type=Path, metavar="FILE", help="take lengths from a file of pairs")
    parser.add_argument("--dim", type=int, default=512, help="a multiple of 64; default: %(default)s")
    parser.add_argument("--depth", type=int, default=9, help="layers; default: %(default)s")
    parser.add_argument("--vocab", type=int, default=4096, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=SEED, help="default: %(default)s")
    add_running(parser, runs=5)
    parser.add_argument("--contestant", choices=list(NAMES), help=argparse.SUPPRESS)
    parser.add_argument("--lengths", help=argparse.SUPPRESS)
    args = parser.parse_args(namespace=argparse.Namespace(model="llama"))
    args.adapted = args.depth // 3 if args.adapted is None else args.adapted
    return args


def compete(args: argparse.Namespace) -> None:
    """Be one contestant, in a process of its own."""
    import contestants
    from peft import LoraConfig, get_peft_model

    from dpo_wrapper.reference.lower_layers import LowerLayers

    def make_step(model: nn.Module, batch: contestants.Batch, args: argparse.Namespace) -> contestants.Step:
        layers = list(range(args.depth - args.adapted, args.depth))
        projections = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
        config = LoraConfig(r=8, target_modules=projections, layers_to_transform=layers)
        adapted = get_peft_model(model, config)
        step = contestants.ours(adapted, batch, args, share="auto", reference="adapter")

        def step_of_contestant() -> Tensor:
            if args.contestant == "once":
                loss = step()
                explanation: str = step.explain()  # type: ignore[attr-defined]
                assert "computed once for both" in explanation, explanation
                return loss
            with mock.patch.object(LowerLayers, "common_layers", lambda _: ([], [])):
                return step()

        return step_of_contestant

    contestants.CONTESTANTS |= dict.fromkeys(NAMES, make_step)
    system, pairs = json.loads(args.lengths)
    of = Lengths(system, [tuple(pair) for pair in pairs])
    print(json.dumps(in_turns(contestants.measure(args, of))))


def main() -> int:
    args = parse()
    if args.contestant:
        compete(args)
        return 0
    of = lengths(args.shape, args.pairs, args.seed, args.data)
    print(
        f"Llama: width {args.dim}, {args.adapted} of {args.depth} layers adapted, vocabulary {args.vocab:,}, "
        f"float32; {len(of.pairs)} pairs, seed {args.seed}, {args.threads} threads\n"
    )
    copied = ("dim", "depth", "adapted", "vocab", "runs", "threads", "seed")
    more = ("--lengths", json.dumps([of.system, of.pairs]))
    results = take_turns(Path(__file__), list(NAMES), args, copied, *more, HF_HUB_OFFLINE="1")
    head = ("", "seconds", "best", "ratio", "peak MB", "gradient norm")
    print("{:<30} {:>8} {:>8} {:>6} {:>8} {:>14}".format(*head))
    for name, result in results.items():
        if "seconds" not in result:
            print(f"{NAMES[name]:<30} {why_not(result)}")
            continue
        ratio = result["seconds"] / results["whole"].get("seconds", float("nan"))
        peak = "unknown" if result["peak_mb"] is None else f"{result['peak_mb']:.0f}"
        times = f"{result['seconds']:>8.3f} {min(result['runs']):>8.3f} {ratio:>6.2f}"
        print(f"{NAMES[name]:<30} {times} {peak:>8} {result['gradient_norm']:>14.6g}")
    share = args.adapted / args.depth
    print(f"\nby the count of layers the ratio is {(1 + 2 * share) / (2 + share):.2f}, without the head")
    if args.json:
        write_json(args, lengths=[of.system, of.pairs], results=results)
    return 1 if any("failed" in result for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
