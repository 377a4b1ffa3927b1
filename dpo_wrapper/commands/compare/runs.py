"""The training runs of a comparison, one after another, each in a process of its own."""

import json
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, fields, replace
from pathlib import Path

from dpo_wrapper.commands.compare.config import Comparison, Contestant
from dpo_wrapper.commands.evaluate.config import EvaluateConfig
from dpo_wrapper.commands.evaluate.run_evaluation import EVALUATION_FILE, run_evaluation
from dpo_wrapper.data.config import DataConfig
from dpo_wrapper.data.whole_files import write_whole
from dpo_wrapper.pretrained import read_run
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.recipe import format_recipe


@dataclass(frozen=True)
class ComparedRun:
    """A run of a contestant with one of the seeds; its recipe and its output are files beside its folder."""

    contestant: Contestant
    seed: int
    out: Path

    @property
    def name(self) -> str:
        return f"{self.contestant.name}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        return self.out / "runs" / self.name

    @property
    def recipe_file(self) -> Path:
        return self.out / "recipes" / f"{self.name}.yaml"

    @property
    def log_file(self) -> Path:
        return self.out / "logs" / f"{self.name}.log"

    @property
    def evaluation(self) -> Path:
        """Folder of what `dpo-wrapper evaluate` writes."""
        return self.out / "evaluations" / self.name

    @property
    def config(self) -> TrainConfig:
        """The settings of the run. All seeds share the eval rows."""
        config = self.contestant.config
        split_seed = config.seed if config.split_seed is None else config.split_seed
        return replace(config, seed=self.seed, split_seed=split_seed, out=self.folder)

    @property
    def is_finished(self) -> bool:
        return read_run(self.folder).get("status") == "finished"

    @property
    def is_evaluated(self) -> bool:
        file = self.evaluation / EVALUATION_FILE
        return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["status"] == "finished"


def evaluate_run(run: ComparedRun, judge: str | None, num_samples: int | None) -> None:
    """Score the eval pairs under a finished run, and judge its answers if there is a judge.

    What it prints is appended to the run's log; answers that are there are not taken again.
    """
    config = run.config
    options = {field.name: getattr(config, field.name) for field in fields(DataConfig)}
    options |= {"data": config.eval_data or config.data, "micro_batch_tokens": config.micro_batch_tokens}
    settings = EvaluateConfig(
        model=str(run.folder),
        out=run.evaluation,
        judge=judge,
        num_samples=num_samples,
        cpu=config.cpu,
        **options,
    )
    with run.log_file.open("a", encoding="utf-8") as log, redirect_stdout(log):
        run_evaluation(settings)


class RunFailedError(RuntimeError):
    """A run ended with a sentence of its own; `status` is its exit status."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


def list_runs(comparison: Comparison) -> list[ComparedRun]:
    """All runs, the first seed of every contestant first."""
    return [
        ComparedRun(contestant, seed, comparison.out)
        for seed in comparison.seeds
        for contestant in comparison.contestants
    ]


def train_run(run: ComparedRun) -> None:
    """Train, or continue, a run. Its output is appended to its log.

    Raises:
        RunFailedError: the run says that it cannot go on.
        KeyboardInterrupt: a signal came. The run has written a checkpoint, unless a second signal came.
    """
    for file in (run.recipe_file, run.log_file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(run.recipe_file, format_recipe(run.config))
    command = [sys.executable, "-m", "dpo_wrapper", "train", str(run.recipe_file)]
    with run.log_file.open("ab") as log:
        # in a session of its own, where Ctrl-C reaches this process alone, which hands it on once
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait()
        except KeyboardInterrupt:
            stop_run(process)
            raise
    if process.returncode:
        lines = run.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        raise RunFailedError(last.removeprefix("dpo-wrapper: "), process.returncode)


def stop_run(process: subprocess.Popen[bytes]) -> None:
    """Ask a run to write a checkpoint and stop; at another signal meanwhile, to stop at once."""
    process.terminate()
    try:
        process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
