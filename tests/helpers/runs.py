"""Runs of the training command in tests: their configuration, their log, and ways to interrupt them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest

from dpo_wrapper.evaluation import samples
from dpo_wrapper.training.config import TrainConfig
from helpers.forked_scripts import PATHS, ROOT, ForkedScript

BUNDLED = ROOT / "examples" / "data" / "preferences.jsonl"
SMALL_DECODER = {"dim": 32, "depth": 1, "heads": 1}
QUICK = {"epochs": 1, "save_steps": 0, "sample_steps": 0, "samples": 0, "exact_answers": 0}
"""Options of a run whose model is all that a test needs."""


def make_config(data, out, **options):
    defaults = {"sft_epochs": 1, "epochs": 2, "batch_size": 4, "max_length": 128, "cpu": True}
    watched = {"eval_steps": 4, "samples": 1}
    return TrainConfig(data=data, out=out, **(defaults | watched | options))


@contextmanager
def short_samples() -> Iterator[None]:
    """Models that are trained inside write samples of few tokens; 120 would take a quarter of a small run."""
    with patch.object(samples, "MAX_COMPLETION_TOKENS", 16):
        yield


def read_metrics(folder, *dropped):
    """The log without times and memory."""
    lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    dropped = {"seconds", "elapsed_seconds", "memory_gb", *dropped}
    return [
        {k: v for k, v in json.loads(line).items() if not k.endswith("/second") and k not in dropped}
        for line in lines
    ]


def assert_metrics_close(expected, actual):
    """The same but for rounding, and for how tokens are packed.

    Until the first update policy and reference are equal, but the reference's log-probs may come from a batch
    of another shape, in which torch rounds differently. Rewards are 0 then, up to rounding, and all are ties.
    Of labelled rows, one may lie at the KL estimate that its reward is compared with, on either side of it.
    """
    assert len(expected) == len(actual)
    for one, other in zip(expected, actual, strict=True):
        ignored = {"tokens/padded", "tokens/unique", "stage", "part"}
        if one["step"] == 0 or (one["step"] == 1 and one["part"] == "step"):
            for record in (one, other):
                rewards = {k: v for k, v in record.items() if k.startswith("rewards/")}
                assert rewards.pop("rewards/accuracies", 0.5) == 0.5
                assert list(rewards.values()) == pytest.approx([0] * len(rewards), abs=1e-5)
        for name in one.keys() - ignored:
            where = (one["stage"], one["part"], one["step"], name)
            is_of_rows = name == "rewards/accuracies" and "kl" in one
            margin = 1 / one["rows/valid"] if is_of_rows else 2e-4
            assert one[name] == pytest.approx(other[name], rel=2e-3, abs=margin), where


class InterruptedRunError(Exception):
    pass


@contextmanager
def interrupt_training(stage: str, *, after_steps: int) -> Iterator[None]:
    """Interrupt the training inside this context once so many steps of a stage are done."""
    from dpo_wrapper.training.trainer import Trainer

    train_step, steps_done = Trainer.train_step, 0

    def interrupted_step(self, *args):
        nonlocal steps_done
        if self.stage.name == stage and steps_done == after_steps:
            raise InterruptedRunError
        steps_done += self.stage.name == stage
        return train_step(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedRunError):
        patch.setattr(Trainer, "train_step", interrupted_step)
        yield


def run_in_processes(number, script, *arguments):
    """A script in so many processes, of which each has to have been one of them; returns what they print."""
    with TemporaryDirectory() as folder:
        forked = ForkedScript(number, Path(folder), script, *arguments)
        codes = forked.wait()
        assert not any(codes), (codes, forked.errors[-3000:])
        assert_were_all(Path(folder), number)
        return forked.output


run_in_two_processes = partial(run_in_processes, 2)


def run_under_torchrun(script, *arguments, **variables):
    """The same in the two processes that `torch.distributed.run` starts."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with TemporaryDirectory() as folder:
        counted = ["-m", "helpers.counted_script", folder, script, *arguments]
        done = subprocess.run(
            list(map(str, [sys.executable, *launch, *counted])),
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": PATHS, **variables},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert_were_all(Path(folder), 2)
    return done.stdout


def assert_were_all(folder, number):
    """Each of so many processes has said that it was one of them."""
    assert {file.name for file in folder.glob("rank *")} == {f"rank {k} of {number}" for k in range(number)}


def train_in_two_processes(script, rows, out, loss=None):
    """A run of two processes with the small decoder and the settings of `make_config`."""
    options = {"save_steps": 0} | ({} if loss is None else {"loss": loss})
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from dpo_wrapper.pretrained import PRESETS\n"
        "from dpo_wrapper.training.train import train\n"
        "from helpers.curves import unrendered_curves\n"
        "from helpers.runs import SMALL_DECODER, make_config, short_samples\n"
        "torch.set_num_threads(1)\n"
        "PRESETS['tiny'] = SMALL_DECODER\n"
        "with unrendered_curves(), short_samples():\n"
        f"    train(make_config(*map(Path, sys.argv[1:]), **{options!r}))\n"
    )
    run_in_two_processes(script, rows, out)
