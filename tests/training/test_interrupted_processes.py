"""A run of two processes that is interrupted again and again, and continued to the same weights."""

import signal

import pytest

from helpers.forked_scripts import ForkedScript
from helpers.runs import read_metrics

pytestmark = pytest.mark.slow

SCRIPT = """
import os, sys
from pathlib import Path
import torch
from dpo_wrapper import cli
from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.training import command_line, train, trainer
from dpo_wrapper.training.evaluator import Evaluator
from dpo_wrapper.training.monitoring.monitor import MeasuredProgress
from dpo_wrapper.training.stages import DPOStage
from helpers.curves import unrendered_curves
from helpers.runs import SMALL_DECODER, make_config

torch.set_num_threads(1)
PRESETS["tiny"] = SMALL_DECODER
rows, out, is_sharded, moment, number, ranks = sys.argv[1:]
place = None

def interrupt(inside):
    global moment
    if (inside, os.environ["RANK"] in ranks) == (moment, True):
        moment = None
        os.kill(os.getpid(), int(number))

def watch(owner, name, word):
    "Note the step, which is the second argument."
    function = getattr(owner, name)
    def watched(self, step, *args, **kwargs):
        global place
        place = f"{word} {step}"
        return function(self, step, *args, **kwargs)
    setattr(owner, name, watched)

def interrupt_after(owner, name, what=None):
    function = getattr(owner, name)
    def interrupted(*args, **kwargs):
        result = function(*args, **kwargs)
        interrupt(what or place)
        return result
    setattr(owner, name, interrupted)

watch(trainer.Trainer, "train_step", "step")
watch(trainer.Trainer, "save_checkpoint", "checkpoint")
watch(Evaluator, "evaluate", "evaluation")
interrupt_after(DPOStage, "micro_batch_loss")
interrupt_after(MeasuredProgress, "update")
interrupt_after(trainer, "write_checkpoint")
interrupt_after(train, "save_pretrained", "save")
options = {"sft_epochs": 0, "epochs": 1, "eval_steps": 2, "save_steps": 2, "samples": 0, "exact_answers": 0}
config = make_config(Path(rows), Path(out), fsdp=is_sharded == "True", **options)
command_line.parse_arguments = lambda _: (config, False)
with unrendered_curves():
    cli.main(["train"])
"""

INTERRUPTIONS = [
    ("step 1", signal.SIGTERM, [1], ["dpo-1"]),
    ("evaluation 2", signal.SIGTERM, [1], ["dpo-2-evaluated"]),
    ("step 3", signal.SIGKILL, [0], ["dpo-2-evaluated"]),
    ("checkpoint 4", signal.SIGKILL, [0, 1], ["dpo-2-evaluated", "dpo-4.new"]),
    ("evaluation 4", signal.SIGKILL, [1], ["dpo-4"]),
    ("save", signal.SIGKILL, [0], ["dpo-6"]),
]
"""When a signal comes, to which of the processes, and what is in checkpoints/ then."""


@pytest.mark.parametrize("is_sharded", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_go_on_to_the_same_weights(rows, tmp_path, is_sharded):
    """All in the first epoch, in which each process has the log-probs of a reference for its own rows."""
    script, out, whole = (tmp_path / name for name in ("script.py", "out", "whole"))
    script.write_text(SCRIPT)

    def run(folder, moment="", number=0, ranks=()):
        words = [is_sharded, moment, int(number), "".join(map(str, ranks))]
        return ForkedScript(2, tmp_path / f"printed {folder.name} {moment}", script, rows, folder, *words)

    assert run(whole).wait() == [0, 0]
    for moment, number, ranks, checkpoints in INTERRUPTIONS:
        forked = run(out, moment, number, ranks)
        codes = forked.wait()
        assert sorted(path.name for path in (out / "checkpoints").iterdir()) == checkpoints, moment
        if number == signal.SIGTERM:
            assert codes == [128 + number] * 2, (moment, forked.errors)
            assert [s for s in forked.sentences if "the same command continues it" in s] == forked.sentences
            assert len(forked.sentences) == 1
            assert "Traceback" not in forked.errors
            own = "shards" if is_sharded else "cache-1.safetensors"
            assert {"random-0.safetensors", "random-1.safetensors", own} <= {
                file.name for file in (out / "checkpoints" / checkpoints[0]).iterdir()
            }
        else:
            assert "Traceback" not in forked.errors and len(forked.sentences) <= 2 - len(ranks), moment
            assert all("processes should go on to the end of the run" in s for s in forked.sentences)
            assert all(codes) and {rank for rank in (0, 1) if codes[rank] == -number} == set(ranks), moment
    assert (out / "model.new").exists() and not (out / "model.safetensors").exists()
    assert run(out).wait() == [0, 0]
    assert read_metrics(out) == read_metrics(whole)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
