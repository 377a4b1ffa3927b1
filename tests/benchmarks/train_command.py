"""`dpo-wrapper train --lora` against TRL's `DPOTrainer` with the same adapter, pairs and batch size.

    python tests/benchmarks/train_command.py            # lengths of hh_harmless, a Llama of 135M parameters
    python tests/benchmarks/train_command.py --model FOLDER --data pairs.jsonl.gz --json result.json

Each contestant is a process of its own that trains for several epochs over the same few steps. They run in
turns, one step each, so that all see the same good and bad minutes of the machine. A step is all that lies
between two steps: loading the batch, policy and reference, the optimizer, the log. Evaluations are left out,
and so is our evaluation of train pairs before the first step, which would compute their reference beforehand.

The adapter is LoRA of rank 8 on all seven projections, the weights are float32, TRL runs without gradient
checkpointing (with it, its default, it is slower and smaller: `--only command trl-checkpointing`).

Time: the median of the first epoch after its first step, and of the later epochs, in which our reference
is remembered. Peak memory: what the process needed during steps beyond what it held before the first
(VmHWM less VmRSS; Linux only).
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contestants import build_llama
from lengths import SHAPES, lengths, texts_of
from measure import TURN, add_running, can_weigh, forget_peak, status, take_turns, tidy, why_not, write_json

SEED = 150
NAMES = {
    "command": "dpo-wrapper train --lora",
    "trl": "TRL DPOTrainer.train",
    "trl-checkpointing": "TRL, with gradient checkpointing (its default)",
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = {"r": 8, "alpha": 16}
MAX_LENGTH = 2048


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a Hugging Face causal LM; by default a new Llama of 135M parameters")
    parser.add_argument("--data", type=Path, metavar="FILE", help="texts of a file of pairs instead of words")
    parser.add_argument("--shape", choices=list(SHAPES), default="hh", help="lengths; default: %(default)s")
    parser.add_argument("--pairs", type=int, default=8, help="of a step; default: %(default)s")
    parser.add_argument("--steps", type=int, default=4, help="of an epoch; default: %(default)s")
    parser.add_argument("--dim", type=int, default=576, help="of the new Llama; default: %(default)s")
    parser.add_argument("--depth", type=int, default=30, help="of the new Llama; default: %(default)s")
    parser.add_argument("--vocab", type=int, default=49152, help="of the new Llama; default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=list(NAMES), help="these contestants")
    parser.add_argument(
        "--seed", type=int, default=SEED, help="picks pairs and weights; default: %(default)s"
    )
    add_running(parser, runs=2)
    parser.add_argument("--contestant", choices=list(NAMES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# what both train on


def write_inputs(args: argparse.Namespace, folder: Path) -> None:
    """The pairs, and the model where none is named."""
    rows = list(make_rows(args))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if args.model is None:
        save_model(args, folder / "model")


def make_rows(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Pairs of words, each of which is a token, or those of a file that are shortest to tell apart."""
    count = args.pairs * args.steps
    if args.data is not None:
        import random

        texts = list(texts_of(args.data))
        random.Random(args.seed).shuffle(texts)
        rows = ({"prompt": p, "chosen": c, "rejected": r} for p, c, r in texts if c.strip() and r.strip())
        yield from (row for _, row in zip(range(count), rows, strict=False))
        return
    chosen, rejected, prompts = lengths(args.shape, count, args.seed).ids(args.vocab - 8, args.seed)
    for one, other, num_prompt in zip(chosen, rejected, prompts, strict=True):
        yield {
            "prompt": spell(one[:num_prompt]),
            "chosen": f" {spell(one[num_prompt:])}",
            "rejected": f" {spell(other[num_prompt:])}",
        }


def spell(ids: list[int]) -> str:
    return " ".join(f"w{id_}" for id_ in ids)


def save_model(args: argparse.Namespace, folder: Path) -> None:
    """A new Llama of the shape of SmolLM2-135M, whose tokens are words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{k}": k + 3 for k in range(1, args.vocab - 4)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(args.seed)
    build_llama(
        vocab_size=args.vocab,
        hidden_size=args.dim,
        intermediate_size=args.dim * 8 // 3,
        num_hidden_layers=args.depth,
        num_attention_heads=args.dim // 64,
        num_key_value_heads=max(1, args.dim // 192),
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ).save_pretrained(folder)


# contestants


class Clock:
    """Times the steps of a training loop, which it stops after each until it is this process's turn again."""

    def __init__(self) -> None:
        self.weighs = can_weigh()
        self.seconds: list[float] = []
        self.peaks: list[int] = []
        self.before = 0

    def start(self) -> None:
        """Called once, before the first step."""
        tidy()
        self.before = status("VmRSS") if self.weighs else 0
        self.wait()

    def end_step(self) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        self.peaks.append(status("VmHWM") - self.before if self.weighs else 0)
        self.wait()

    def wait(self) -> None:
        print(TURN, flush=True, file=sys.__stdout__)
        sys.__stdin__.readline()  # type: ignore[union-attr]
        if self.weighs:
            forget_peak()
        self.began = time.perf_counter()

    def result(self, args: argparse.Namespace) -> dict[str, Any]:
        first, later = self.seconds[1 : args.steps], self.seconds[args.steps :]
        return {
            "first_epoch": statistics.median(first),
            "later_epochs": statistics.median(later),
            "runs": self.seconds,
            "peak_mb": max(self.peaks[1:]) / 1e6 if self.weighs else None,
        }


def run_command(args: argparse.Namespace, clock: Clock) -> None:
    from dpo_wrapper.cli import main
    from dpo_wrapper.training.evaluator import Evaluator
    from dpo_wrapper.training.monitoring.monitor import Monitor

    Evaluator.evaluate_if_due = lambda self, step: None  # type: ignore[assignment, method-assign, misc]
    log_step, make = Monitor.log_step, Monitor.__enter__

    def start(self: Monitor) -> Monitor:
        clock.start()
        return make(self)

    def end_step(self: Monitor, *arguments: Any) -> None:
        log_step(self, *arguments)
        clock.end_step()

    Monitor.__enter__, Monitor.log_step = start, end_step  # type: ignore[method-assign]
    options = {
        "data": args.folder / "pairs.jsonl",
        "out": args.folder / "run",
        "model": args.model or args.folder / "model",
        "loss": "sigmoid(beta=0.1)",
        "as-chat": "never",
        "batch-size": args.pairs,
        "epochs": args.runs + 1,
        "eval-fraction": 0,
        "save-steps": 0,
        "exact-answers": 0,
        "samples": 0,
        "max-length": MAX_LENGTH,
        "lora-r": LORA["r"],
        "lora-alpha": LORA["alpha"],
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    main(["train", *given, "--lora", "--lora-targets", *PROJECTIONS, "--cpu"])


def run_trl(args: argparse.Namespace, clock: Clock, checkpointing: bool) -> None:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class EachStep(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end_step()

    name = str(args.model or args.folder / "model")
    config = DPOConfig(
        output_dir=str(args.folder / "trl"),
        beta=0.1,
        per_device_train_batch_size=args.pairs,
        num_train_epochs=args.runs + 1,
        max_length=MAX_LENGTH,
        gradient_checkpointing=checkpointing,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(name)
    DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32),
        args=config,
        train_dataset=load_dataset("json", data_files=str(args.folder / "pairs.jsonl"), split="train"),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=LORA["r"], lora_alpha=LORA["alpha"], target_modules=list(PROJECTIONS), task_type="CAUSAL_LM"
        ),
        callbacks=[EachStep()],
    ).train()


def run_contestant(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(args.threads)
    clock = Clock()
    sys.stdin.readline()
    with contextlib.redirect_stdout(sys.stderr):
        if args.contestant == "command":
            run_command(args, clock)
        else:
            run_trl(args, clock, checkpointing=args.contestant == "trl-checkpointing")
    print(json.dumps(clock.result(args)))


# the table


def report(results: dict[str, dict[str, Any]]) -> None:
    head = ("", "first epoch", "ratio", "later epochs", "ratio", "peak MB", "ratio")
    print("\n{:<48} {:>12} {:>6} {:>13} {:>6} {:>8} {:>6}".format(*head))
    ours = results.get("command", {})
    for name, result in results.items():
        if "first_epoch" not in result:
            print(f"{NAMES[name]:<48} {why_not(result)}")
            continue
        cells: list[Any] = []
        for key in ("first_epoch", "later_epochs", "peak_mb"):
            value, own = result[key], ours.get(key)
            cells += [value or 0.0, f"{value / own:.2f}" if value and own else ""]
        print("{:<48} {:>10.3f} s {:>6} {:>11.3f} s {:>6} {:>8.0f} {:>6}".format(NAMES[name], *cells))


def main() -> int:
    args = parse()
    if args.contestant:
        run_contestant(args)
        return 0
    names = args.only or ["command", "trl"]
    with tempfile.TemporaryDirectory(prefix="dpo-benchmark-") as folder:
        write_inputs(args, Path(folder))
        print(f"{args.pairs} pairs a step, {args.steps} steps an epoch, {args.runs + 1} epochs, ", end="")
        print(f"LoRA of rank {LORA['r']}, {args.threads} threads", flush=True)
        copied = ("pairs", "steps", "seed", "runs", "threads")
        more = [f"--folder={folder}", *([f"--model={args.model}"] if args.model else [])]
        script = Path(__file__)
        results = take_turns(script, names, args, copied, *more, HF_HUB_OFFLINE="1")
    report(results)
    if args.json:
        write_json(args, results=results)
    return 1 if any("failed" in result for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
