"""A run that meets trouble at each of its writes: a full disk, SIGTERM, its folder taken away.

It is continued by the same command after each, and meets the next one.
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from dpo_wrapper import cli
from dpo_wrapper.pretrained import load_pretrained
from dpo_wrapper.training import command_line
from dpo_wrapper.training.best_model import BestEvaluation
from dpo_wrapper.training.checkpoint_folder import CheckpointFolder, sort_key
from helpers.models import hf_llama
from helpers.runs import make_config, read_metrics
from helpers.tokenizers import save_tokenizer
from helpers.watched_writes import KINDS, WatchedWrites, free_files, limit_files, refuse

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="signals, and limits of files"),
]

SMALL = {"batch_size": 16, "max_length": 16, "share_prefix": "never", "exact_answers": 0, "eval_steps": 1}
ALL = {"sft_epochs": 1, "epochs": 1, "samples": 1, "save_steps": 1, "keep_best": True} | SMALL
SHORT = {"sft_epochs": 0, "epochs": 1, "samples": 0, "save_steps": 1, "batch_size": 32}
OPTIONS = {
    "all": ALL | {"precompute_ref_log_probs": True},
    "no checkpoints": ALL | {"save_steps": 0, "keep_best": False, "sft_epochs": 0},
    "best without checkpoints": ALL | {"save_steps": 0, "sft_epochs": 0},
    "hugging face": SMALL | SHORT,
    "lora": SMALL | SHORT | {"lora": True},
}


@pytest.fixture
def quick(monkeypatch):
    """Neither flushes nor a search for garbage, which take longer than all else."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


@pytest.fixture
def best_in_the_middle(monkeypatch):
    observe = BestEvaluation.observe

    def observe_other(self, step, metrics):
        return observe(self, step, {**metrics, "loss": abs(step - 1)})

    monkeypatch.setattr(BestEvaluation, "observe", observe_other)


class Run:
    """The command of a run, which is repeated until it is finished."""

    def __init__(self, monkeypatch, capsys, config):
        self.monkeypatch, self.capsys, self.config = monkeypatch, capsys, config

    def run(self, out):
        """Exit status and the sentence of the command."""
        config = self.config(out)
        self.monkeypatch.setattr(command_line, "parse_arguments", lambda _: (config, False))
        status = 0
        try:
            cli.main(["train"])
        except SystemExit as exit_:
            status = exit_.code
        lines = self.capsys.readouterr().err.splitlines()
        return status, [line for line in lines if line.startswith("dpo-wrapper: ")]


@pytest.fixture(params=OPTIONS)
def run(request, rows, tmp_path, monkeypatch, capsys, quick, best_in_the_middle):
    options = OPTIONS[request.param]
    if request.param in ("hugging face", "lora"):
        model = tmp_path / "llama"
        hf_llama(0, vocab_size=420, max_position_embeddings=256).save_pretrained(model)
        save_tokenizer(model)
        options = options | {"model": str(model)}
    return Run(monkeypatch, capsys, lambda out: make_config(rows, out, **options))


def newest_checkpoint(out):
    names = CheckpointFolder(out / "checkpoints", 1)
    progress, _ = names.find_newest(None)
    return None if progress is None else sort_key(progress.checkpoint_name)


def status_of(out):
    file = out / "run.json"
    return json.loads(file.read_text())["status"] if file.exists() else None


def repeat(run, out, writes, check):
    """Repeat the command until it meets no more trouble; its progress is never lost."""
    progress, number = (-1,), 0
    while True:
        with writes.watch():
            try:
                status, sentences = run.run(out)
            finally:
                free_files()
        number += 1
        if not writes.num_met:
            assert (status, sentences) == (0, []), sentences
            return number
        check(status, sentences)
        if status_of(out) == "finished":
            return number
        newest = newest_checkpoint(out)
        assert status_of(out) == "trained" or (newest or (-1,)) >= progress
        progress = newest or (-1,)
        if status_of(out) == "training":
            with pytest.raises(ValueError, match="has not finished"):
                load_pretrained(str(out), None, 16)


def assert_same_result(out, whole):
    (weights,) = [file.name for file in whole.glob("*model.safetensors")]
    assert (out / weights).read_bytes() == (whole / weights).read_bytes()
    assert read_metrics(out) == read_metrics(whole)


def test_a_full_disk(run, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    run.run(whole)
    troubles = {"open": [limit_files, refuse], "rust": [limit_files]}
    troubles |= {kind: [refuse] for kind in ("os.mkdir", "os.link", "os.rename")}
    writes = WatchedWrites(out, troubles)

    def check(status, sentences):
        print(status, sentences, file=sys.__stdout__)
        (sentence,) = sentences
        assert status in (1, 2)

    n = repeat(run, out, writes, check)
    print(n, writes.names, file=sys.__stdout__)
    assert_same_result(out, whole)


def test_sigterm(run, tmp_path, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    run.run(whole)
    kill = lambda path: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    writes = WatchedWrites(out, {kind: [kill] for kind in KINDS}, is_once=True)

    def check(status, sentences):
        print(status, sentences, file=sys.__stdout__)
        (sentence,) = sentences
        assert status == 143

    n = repeat(run, out, writes, check)
    print(n, writes.names, file=sys.__stdout__)
    assert_same_result(out, whole)
