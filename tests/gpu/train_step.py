"""One training step of a real shape: ours against TRL, and against packing without shared prefixes.

    python tests/gpu/train_step.py --json step.json                       # the cases below, in order
    python tests/gpu/train_step.py --case 0.5b full hh 64 --only tree trl
    python tests/gpu/train_step.py --device cpu --toy

A case is a model, what of it trains (all, or LoRA adapters of rank 16 on all linear layers), the lengths of
its pairs (`tests/benchmarks/lengths.py`) and their number. Models are Llamas with random weights and the
sizes of Qwen2.5, in bfloat16 with torch's SDPA. A step is forward, backward and AdamW. The contestants of a
case run in turns in one process on the same model, reference and optimizer; the learning rate is 0, so that
all see the same weights.

Packing is ours over sequences whose first tokens differ, so that nothing is shared. What is compiled in
parts is what `--torch-compile` compiles: feed-forward layers and norms. Compiled layers are whole decoder
layers, in which attention stands between the graphs.

Time: the median of several steps after two that warm up (and compile); building our tree from padded rows
counts, collators do not.

Peak memory, on CUDA: torch.cuda.max_memory_allocated during a step less what was allocated before, when
models and optimizer states are there; gradients and activations count.

Model-FLOPs utilisation (MFU): the FLOPs that the step needs if each unique token is computed once, over the
seconds and the card's dense bfloat16 peak (`--peak-flops`; 989e12 is an H100's). A forward pass needs

    linear     2 * weights of the decoder's linear layers * unique tokens
    attention  4 * width * layers * (sum over the unique tokens of the tokens that each attends to)
    head       2 * width * vocabulary * unique scored positions

and a step four of each: the policy's, twice that backward, the reference's. With LoRA, the linear layers and
the head count three times, as the gradients of their own weights are not needed. All contestants are held
against these numbers, so that MFUs compare as speeds do.
"""

import argparse
import statistics
import sys
from argparse import Namespace
from dataclasses import asdict
from typing import Any

import torch
from contestants import Step
from measure import UnavailableError, add_running, timed, why_not
from torch import Tensor
from training_case import Case, Setup, add_case_options, free_memory, run_cases, set_up

CASES = [
    Case("1.5b", "full", "en", 16),
    Case("1.5b", "full", "hh", 32),
    Case("0.5b", "full", "hh", 64),
    Case("1.5b", "lora", "en", 16),
    Case("1.5b", "lora", "hh", 32),
    Case("0.5b", "full", "en", 16),
    Case("0.5b", "lora", "hh", 64),
    Case("0.5b", "lora", "en", 16),
]

NAMES = {
    "tree": "dpo_wrapper",
    "tree-checkpointing": "dpo_wrapper, checkpointing",
    "tree-compiled-parts": "dpo_wrapper, compiled in parts",
    "tree-compiled-layers": "dpo_wrapper, compiled layers",
    "packed": "dpo_wrapper, nothing shared",
    "trl": "TRL DPOTrainer",
    "trl-checkpointing": "TRL DPOTrainer, checkpointing (its default)",
    "plain": "dpo_wrapper, padded rows",
}
DEFAULT_NAMES = [name for name in NAMES if name not in ("plain", "tree-compiled-layers")]
"""Without what takes long: whole layers are compiled for more than a minute."""


OUT_OF_MEMORY = "out of memory"


# measuring


def measure_step(setup: Setup, forward: Step) -> dict[str, Any]:
    """Seconds of a step, its peak memory in MB, and the loss."""
    losses: list[Tensor] = []
    is_cuda, before = setup.device == "cuda", 0
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds = timed(lambda: losses.append(setup.train_step(forward)), setup.device)
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6 if is_cuda else None
    return {"seconds": seconds, "peak_mb": peak, "loss": float(losses[0])}


def in_words(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]


def measure_case(setup: Setup, names: list[str], runs: int) -> dict[str, dict[str, Any]]:
    """Seconds and memory of each contestant, or `missing` or `failed` with the reason; in turns."""
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    reasons: dict[str, dict[str, Any]] = {}
    forwards: dict[str, Step] = {}
    for turn in range(-2, runs):  # in the first, TRL changes settings by which torch compiles anew
        for name in [name for name in names if name not in reasons]:
            try:
                if name not in forwards:
                    forwards[name] = setup.build_forward(name)
                setup.set_modes(name)
                step = measure_step(setup, forwards[name])
                if turn != -1:
                    steps[name].append(step)
            except UnavailableError as error:
                reasons[name] = {"missing": str(error)}
            except Exception as error:  # of whatever kind: it is a line of the table
                reasons[name] = {"failed": in_words(error)}
            if name in reasons:
                forwards.pop(name, None)
                setup.optimizer.zero_grad(set_to_none=True)
                free_memory()
    return {name: reasons.get(name) or to_result(steps[name], forwards[name]) for name in names}


def to_result(steps: list[dict[str, Any]], forward: Step) -> dict[str, Any]:
    """Of a contestant's steps, the first of which warms up."""
    first, *others = steps
    runs = [step["seconds"] for step in others]
    result = {
        "seconds": statistics.median(runs),
        "runs": runs,
        "peak_mb": others[0]["peak_mb"] and max(step["peak_mb"] for step in others),
        "loss": first["loss"],
        "first_seconds": first["seconds"],
    }
    explain = getattr(forward, "explain", None)
    return result | ({"explain": explain().splitlines()} if explain else {})


def summarize(setup: Setup, results: dict[str, dict[str, Any]], peak_flops: float) -> dict[str, Any]:
    """The record of a case; adds to the results of each contestant what follows from its times."""
    tokens, flops = setup.batch.counts(), setup.flops()
    for result in results.values():
        if "seconds" in result:
            result["unique_tokens_per_second"] = tokens["unique"] / result["seconds"]
            result["mfu"] = sum(flops.values()) / result["seconds"] / peak_flops
    parameters = sum(p.numel() for p in setup.model.parameters())
    return {
        "case": asdict(setup.case),
        "parameters": parameters,
        "trained": sum(p.numel() for p in setup.model.parameters() if p.requires_grad),
        "tokens": tokens,
        "step_flops": flops,
        "results": results,
    }


def report(record: dict[str, Any]) -> None:
    if "results" not in record:
        print(why_not(record))
        return
    tokens, results = record["tokens"], record["results"]
    parameters, trained = record["parameters"] / 1e6, record["trained"] / 1e6
    print(f"{parameters:,.0f} M parameters, {trained:,.1f} M trained; ", end="")
    print(f"{tokens['padded']:,} tokens padded, {tokens['real']:,} real, {tokens['unique']:,} unique")
    columns = ("", "seconds", "ratio", "peak MB", "ratio", "unique/s", "MFU", "loss", "first")
    print("{:<45} {:>8} {:>6} {:>8} {:>6} {:>9} {:>6} {:>8} {:>6}".format(*columns))
    tree = results.get("tree", {})
    for name, result in results.items():
        if "seconds" not in result:
            print(f"{NAMES[name]:<45} {why_not(result)}")
            continue
        seconds, peak = result["seconds"], result["peak_mb"]
        slower = f"{seconds / tree['seconds']:.2f}" if "seconds" in tree else ""
        heavier = f"{peak / tree['peak_mb']:.2f}" if peak and tree.get("peak_mb") else ""
        shown = "unknown" if peak is None else f"{peak:,.0f}"
        print(
            f"{NAMES[name]:<45} {seconds:>8.4f} {slower:>6} {shown:>8} {heavier:>6} "
            f"{result['unique_tokens_per_second']:>9,.0f} {result['mfu']:>6.1%} {result['loss']:>8.4f} "
            f"{result['first_seconds']:>6.1f}"
        )


def parse() -> Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_case_options(parser, "see CASES")
    parser.add_argument("--only", nargs="+", choices=list(NAMES), default=DEFAULT_NAMES)
    parser.add_argument("--peak-flops", type=float, default=989e12, help="default: an H100's, %(default)s")
    add_running(parser, runs=3)
    return parser.parse_args()


def run_case(case: Case, args: Namespace) -> dict[str, Any]:
    """The record of a case, or `missing` or `failed` with the reason; reported."""
    try:
        setup = set_up(case, args.device)
        record = summarize(setup, measure_case(setup, args.only, args.runs), args.peak_flops)
    except UnavailableError as error:
        record = {"case": asdict(case), "missing": str(error)}
    except Exception as error:  # of whatever kind: other cases may do
        record = {"case": asdict(case), "failed": in_words(error)}
    report(record)
    return record


def has_failed(record: dict[str, Any]) -> bool:
    """Whether anything failed for another reason than lack of memory, which is a result."""
    results = [record, *record.get("results", {}).values()]
    return any(result.get("failed", OUT_OF_MEMORY) != OUT_OF_MEMORY for result in results)


def main() -> int:
    records = run_cases(parse(), CASES, run_case)
    return 1 if any(map(has_failed, records)) else 0


if __name__ == "__main__":
    sys.exit(main())
