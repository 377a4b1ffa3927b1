"""Runs that are ended at random moments by SIGKILL or SIGTERM, and continued by the same command."""

import os
import random
import signal
import time

import psutil  # type: ignore[import-untyped]
import pytest

from helpers.forked_scripts import ForkedScript
from helpers.runs import read_metrics

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")

SCRIPT = """
import sys
from pathlib import Path
import torch
from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.training.train import train
from helpers.curves import unrendered_curves
from helpers.runs import SMALL_DECODER, make_config
torch.set_num_threads(1)
PRESETS["tiny"] = SMALL_DECODER
with unrendered_curves():
    train(make_config(*map(Path, sys.argv[1:]), epochs=1, save_steps=1, keep_best=True, exact_answers=2))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number, count", [(signal.SIGKILL, 20), (signal.SIGTERM, 10)], ids=["kill", "term"])
def test_a_run_that_is_ended_at_any_moment_goes_on_to_the_same_weights(rows, tmp_path, number, count):
    """Moments are spread over the whole run: steps, checkpoints after each, evaluations, the last save."""
    rng, unfinished, script = random.Random(count), 0, tmp_path / "script.py"
    script.write_text(SCRIPT)

    def start(out):
        return ForkedScript(0, tmp_path / "printed", script, rows, out).process

    started = time.perf_counter()
    start(tmp_path / "whole").wait()
    duration = time.perf_counter() - started
    expected = read_weights(tmp_path / "whole")
    for k in range(count):
        out = tmp_path / f"out{k}"
        process = start(out)
        time.sleep(duration * (k + rng.random()) / count)
        end(process, number)
        if not is_finished(out):
            unfinished += 1
            start(out).wait(timeout=120)
        assert is_finished(out), k
        assert read_weights(out) == expected, k
        assert read_metrics(out) == read_metrics(tmp_path / "whole"), k
    assert unfinished >= count // 2


def end(process, number):
    try:
        process.send_signal(number)
        process.wait(timeout=60)
    except psutil.NoSuchProcess:  # it was quicker
        pass


def read_weights(out):
    return (out / "model.safetensors").read_bytes()


def is_finished(out):
    file = out / "run.json"
    return file.exists() and '"status": "finished"' in file.read_text(encoding="utf-8")
