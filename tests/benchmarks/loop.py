"""What the loop of `dpo-wrapper train` adds to a bare step: `dpo(batch)`, backward, clipping and
`optimizer.step()`.

    python tests/benchmarks/loop.py                                        # the preset tiny, bundled pairs
    python tests/benchmarks/loop.py --model FOLDER --data pairs.jsonl --pairs 8 --runs 8

Loop and bare step run in turns in one process, each with a model of its own from the same seed, on the same
batches. A step of the loop is all that lies between two steps: to collate the batch, metrics, checks, the log
and the bar. The batches of the bare step are collated before its time begins. Evaluations, samples and
checkpoints are left out. The first epoch computes the reference, later ones look it
up, so that their steps are shorter and the loop's part in them is larger. The overhead is the median of the
ratios of steps that followed one another, for the speed of a machine changes within a run.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measure import add_running, timed, write_json

from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.monitoring.trackers import Trackers
from dpo_wrapper.training.optimizer import create_optimizer
from dpo_wrapper.training.processes import create_accelerator
from dpo_wrapper.training.setup import set_up_training
from dpo_wrapper.training.stages import DPOStage
from dpo_wrapper.training.train import create_stage
from dpo_wrapper.training.trainer import Trainer

BUNDLED = Path(__file__).parents[2] / "examples" / "data" / "preferences.jsonl"


class LoopInTurns(Trainer):
    """The loop of the command, in front of each step of which a bare step is timed."""

    bare: Any
    seconds: dict[str, list[float]]

    def create_step_loader(self, steps_done: int) -> Any:
        return self.take_turns(iter(super().create_step_loader(steps_done)))

    def take_turns(self, loader: Iterator[Any]) -> Iterator[Any]:
        self.seconds = {"bare": [], "loop": []}
        make_batches = self.micro_batch_maker(self.splits.train)
        for step in range(self.num_steps):
            batches = make_batches(self.sampler[step])
            self.seconds["bare"].append(timed(lambda batches=batches: self.bare(batches)))
            start = time.perf_counter()
            yield next(loader)
            self.seconds["loop"].append(time.perf_counter() - start)


class BareStep:
    """A step as a loop of one's own has it."""

    def __init__(self, config: TrainConfig) -> None:
        setup = set_up_training(config)
        accelerator = create_accelerator(config)
        stage = create_stage(setup, setup.stages[-1], accelerator)
        assert isinstance(stage, DPOStage)
        self.dpo, self.device = stage.dpo.to(accelerator.device), accelerator.device
        self.optimizer = create_optimizer(self.dpo, config, stage.learning_rate, self.device)
        self.max_grad_norm = config.max_grad_norm

    def __call__(self, batches: list[Any]) -> None:
        batches = [batch.to(self.device) for batch in batches]
        if len(batches) > 1:
            batches = self.dpo.normalize_over_step(batches)
        for batch in batches:
            self.dpo(batch).backward()
        torch.nn.utils.clip_grad_norm_(self.dpo.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="as of the command; default: %(default)s")
    parser.add_argument("--data", type=Path, default=BUNDLED, metavar="FILE", help="default: bundled pairs")
    parser.add_argument("--pairs", type=int, default=16, help="of a step; default: %(default)s")
    parser.add_argument("--workers", type=int, default=0, help="that load batches; default: %(default)s")
    add_running(parser, runs=64)
    return parser.parse_args()


def measure(args: argparse.Namespace, folder: Path) -> tuple[dict[str, list[float]], int]:
    """Seconds of the steps of both, and the number of steps of an epoch."""
    torch.set_num_threads(args.threads)
    config = TrainConfig(
        data=args.data,
        out=folder / "run",
        model=args.model,
        stage=("dpo",),
        epochs=1000,
        max_steps=args.runs,
        batch_size=args.pairs,
        num_workers=args.workers,
        eval_steps=10**9,
        save_steps=0,
        samples=0,
        exact_answers=0,
        cpu=True,
    )
    bare = BareStep(config)
    setup = set_up_training(config)
    setup.run.open()
    stage = create_stage(setup, setup.stages[-1], create_accelerator(config))
    with Trackers(config, setup.run) as trackers:
        trainer = LoopInTurns(
            setup.config, setup.run, stage, setup.stages[-1].splits, setup.pretrained, trackers
        )
        trainer.bare = bare
        trainer.train()
    return trainer.seconds, len(trainer.sampler) // stage.epochs


def main() -> int:
    args = parse()
    args.runs += 2  # the first warms up, and the last ends with an evaluation
    with tempfile.TemporaryDirectory() as folder:
        seconds, num_epoch_steps = measure(args, Path(folder))
    pairs = list(zip(seconds["bare"], seconds["loop"], strict=False))[1 : args.runs - 1]
    epochs = {"first epoch": pairs[: num_epoch_steps - 1], "later epochs": pairs[num_epoch_steps - 1 :]}
    results = {}
    print(f"\n{args.model}, {args.pairs} pairs a step, {args.threads} threads; medians")
    print("{:<14} {:>6} {:>10} {:>10} {:>9}".format("", "steps", "bare, s", "loop, s", "overhead"))
    for name, steps in epochs.items():
        if steps:
            bare, loop = (statistics.median(times) for times in zip(*steps, strict=True))
            overhead = statistics.median(of_loop / of_bare - 1 for of_bare, of_loop in steps)
            results[name] = {"steps": len(steps), "bare": bare, "loop": loop, "overhead": overhead}
            print(f"{name:<14} {len(steps):>6} {bare:>10.4f} {loop:>10.4f} {overhead:>9.1%}")
    if args.json:
        write_json(args, results=results, seconds=seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
