"""Runs that are ended at random moments by SIGKILL or SIGTERM, and continued by the same command."""

import contextlib
import json
import random
import signal
from collections import Counter
from functools import partial

import psutil  # type: ignore[import-untyped]
import pytest

from helpers.ended_runs import KINDS, find_moment, plan_end, read_durations
from helpers.forked_scripts import ForkedScript
from helpers.lora_runs import save_llama
from helpers.runs import read_metrics

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.training.train import train
from helpers.curves import unrendered_curves
from helpers.ended_runs import watch_moments
from helpers.runs import SMALL_DECODER, make_config
torch.set_num_threads(1)
PRESETS["tiny"] = SMALL_DECODER
out = Path(sys.argv[1])
with unrendered_curves(), watch_moments(out):
    train(make_config(out=out, **json.loads(out.with_suffix(".json").read_text())))
"""
OPTIONS = {
    "epochs": 1,
    "batch_size": 8,
    "save_steps": 1,
    "eval_steps": 2,
    "exact_answers": 2,
    "keep_best": True,
}


@pytest.fixture
def start_run(tmp_path):
    """Starts a run with some options into a folder, and returns its process."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def start_run(out, options):
        out.with_suffix(".json").write_text(json.dumps(OPTIONS | options))
        return ForkedScript(0, tmp_path / "printed", script, out).process

    return start_run


def end_runs(folder, start, number, count):
    """Runs that are ended in moments of all kinds in turn, and continued to the same result.

    If each of a kind was ended too early or too late for it, there are more of them than `count`.

    Args:
        start: starts a run into a folder, and returns its process.
    """
    rng, met = random.Random(count), Counter()
    whole = folder / "whole"
    start(whole).wait(timeout=120)
    durations = read_durations(whole)
    for k in range(3 * count):
        if k >= count and met.keys() >= set(KINDS):
            break
        out, kind = folder / f"out{k}", KINDS[k % len(KINDS)]
        plan_end(out, kind, number, durations[kind], rng)
        wait_for(start(out))
        met[find_moment(out)] += 1
        if not is_finished(out):
            wait_for(start(out))
        assert is_finished(out), (k, kind)
        assert read_weights(out) == read_weights(whole), (k, kind)
        assert read_metrics(out) == read_metrics(whole), (k, kind)
    assert met.keys() >= set(KINDS), met


@pytest.mark.parametrize("number, count", [(signal.SIGKILL, 20), (signal.SIGTERM, 10)], ids=["kill", "term"])
def test_a_run_that_is_ended_at_any_moment_goes_on_to_the_same_weights(
    rows, tmp_path, start_run, number, count
):
    """Of two stages: moments are inside steps, checkpoints after each, evaluations and the last save."""
    end_runs(tmp_path, partial(start_run, options={"data": str(rows)}), number, count)


@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
def test_a_hugging_face_model_that_is_killed_goes_on_to_the_same_weights(rows, tmp_path, start_run, is_lora):
    model = str(save_llama(tmp_path / "llama"))
    options = {"data": str(rows), "model": model, "lora": is_lora, "sft_epochs": 0, "learning_rate": 1e-2}
    end_runs(tmp_path, partial(start_run, options=options), signal.SIGKILL, 8)


def wait_for(process):
    with contextlib.suppress(psutil.NoSuchProcess):  # it was quicker
        process.wait(timeout=120)


def read_weights(out):
    return {file.name: file.read_bytes() for file in out.glob("*model.safetensors")}


def is_finished(out):
    file = out / "run.json"
    return file.exists() and '"status": "finished"' in file.read_text(encoding="utf-8")
