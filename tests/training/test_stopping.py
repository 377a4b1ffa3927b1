"""A run that stops before its end: by a signal, a loss that is not finite, or a full disk."""

import errno
import json
import math
import os
import random
import signal
import sys

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from dpo_wrapper import cli
from dpo_wrapper.pretrained import PRESETS, load_pretrained
from dpo_wrapper.training import checkpoint, command_line, setup, stages
from dpo_wrapper.training import train as train_module
from dpo_wrapper.training.monitoring.monitor import MeasuredProgress
from dpo_wrapper.training.stopping import StoppedBySignal, StopRequest, TrainingError
from dpo_wrapper.training.train import train
from dpo_wrapper.training.trainer import Trainer
from helpers.forked_scripts import call_in_fork
from helpers.runs import SMALL_DECODER, make_config, read_metrics

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")


def after_calls(function, number, then):
    """The function, but the call of this number, from 1, does something else first."""
    calls = 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            then()
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.slow
@pytest.mark.parametrize(
    "owner, name, call, number",
    [
        (stages.SFTStage, "micro_batch_loss", 2, signal.SIGINT),
        (stages.SFTStage, "evaluate", 1, signal.SIGTERM),
        (stages.DPOStage, "micro_batch_loss", 1, signal.SIGTERM),
        (stages.DPOStage, "evaluate", 4, signal.SIGINT),
        (Trainer, "train_step", 6 + 12, signal.SIGTERM),  # the very last step
    ],
)
def test_a_signal_writes_a_checkpoint_first(
    finished_run, rows, tmp_path, monkeypatch, owner, name, call, number
):
    out = tmp_path / "out"
    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(StoppedBySignal) as stopped:
        # where the tests run in the background, the shell has told them to ignore SIGINT
        patch.setattr(signal, "getsignal", lambda _: signal.default_int_handler)
        kill = after_calls(getattr(owner, name), call, lambda: os.kill(os.getpid(), number))
        patch.setattr(owner, name, kill)
        train(make_config(rows, out, save_steps=0))
    assert stopped.value.number == number and signal.getsignal(number) == before
    assert list(out.glob(f"checkpoints/*/{checkpoint.STATE_FILE}"))
    train(make_config(rows, out, save_steps=0, resume=True))
    assert read_metrics(out) == read_metrics(finished_run)
    assert (out / "model.safetensors").read_bytes() == (finished_run / "model.safetensors").read_bytes()


@pytest.mark.parametrize("call", [1, 4, 6, 9])
def test_a_signal_during_an_evaluation_stops_it(rows, tmp_path, monkeypatch, call):
    """Before the first step, between steps, and after the last: the evaluation is made again as a whole."""
    monkeypatch.setitem(PRESETS, "tiny", SMALL_DECODER)
    options = {"sft_epochs": 0, "epochs": 1, "eval_steps": 2, "save_steps": 0, "exact_answers": 2}
    train(make_config(rows, tmp_path / "whole", **options))
    with monkeypatch.context() as patch, pytest.raises(StoppedBySignal):
        patch.setattr(signal, "getsignal", lambda _: signal.default_int_handler)
        kill = after_calls(MeasuredProgress.update, call, lambda: os.kill(os.getpid(), signal.SIGINT))
        patch.setattr(MeasuredProgress, "update", kill)
        train(make_config(rows, tmp_path / "stopped", **options))
    stopped = read_metrics(tmp_path / "stopped")
    train(make_config(rows, tmp_path / "stopped", **options))
    whole = read_metrics(tmp_path / "whole")
    assert read_metrics(tmp_path / "stopped") == whole and stopped == whole[: len(stopped)] != whole
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]


def test_a_second_signal_acts_at_once(capfd):
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), StopRequest() as request:
            os.kill(os.getpid(), signal.SIGINT)
            assert request.number == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
        assert (
            "SIGINT: the run writes a checkpoint after this step or batch, and stops"
            in capfd.readouterr().err
        )
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGINT)
        assert request.number is None
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.slow
def test_sigterm_outside_of_the_steps(rows, tmp_path, monkeypatch):
    """In processes of their own, which say in one line what the same command does."""
    sentences = {
        (setup, "tokenize_splits"): "interrupted before anything was done.",
        (setup, "load_stage_policy"): "interrupted before anything was done.",
        (train_module, "create_stage"): "the same command begins it again, for it has no checkpoint, in {}.",
        (train_module, "save_stage"): "the same command continues it in {}.",
        (train_module, "precompute_ref_log_probs"): "the same command continues it in {}.",
        (train_module, "report_results"): "the same command continues it in {}.",
    }
    options = {"epochs": 1, "batch_size": 32, "max_length": 16, "share_prefix": "never", "exact_answers": 0}
    options |= {"samples": 0, "save_steps": 1, "precompute_ref_log_probs": True}

    def run(out, owner, name):
        config = make_config(rows, out, **options)
        kill = after_calls(getattr(owner, name), 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with monkeypatch.context() as patch:
            patch.setattr(command_line, "parse_arguments", lambda _: (config, False))
            patch.setattr(owner, name, kill)
            status = call_in_fork(lambda: cli.main(["train"]), tmp_path / "printed")
        return status, (tmp_path / "printed").read_text()

    def read_weights(out):
        return (out / "model.safetensors").read_bytes()

    train(make_config(rows, tmp_path / "whole", **options))  # here: what it imports no fork has to import
    for (owner, name), sentence in sentences.items():
        out = tmp_path / name
        status, printed = run(out, owner, name)
        lines = printed.split("dpo-wrapper: ")
        assert status == 128 + signal.SIGTERM and len(lines) == 2, (name, printed)
        assert lines[1].endswith(sentence.format(out) + "\n") and lines[1].count("\n") == 1
        train(make_config(rows, out, **options))
        assert read_weights(out) == read_weights(tmp_path / "whole"), name
        assert read_metrics(out) == read_metrics(tmp_path / "whole"), name


def run_command(capsys, *args):
    """Exit status and the sentence of a command."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(map(str, args)))
    sentences = [s for s in capsys.readouterr().err.splitlines() if s.startswith("dpo-wrapper: ")]
    return exit_.value.code, sentences


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_loss_that_is_not_finite_stops_the_run(rows, tmp_path, capsys, stage):
    out = tmp_path / "out"
    args = ["train", "--data", rows, "--out", out, "--cpu", "--batch-size", "4", "--max-length", "32"]
    args += ["--lr", "1e30", "--sft-lr", "1e30"] if stage == "sft" else ["--lr", "1e30", "--sft-epochs", "0"]
    args = ["--sft-learning-rate" if arg == "--sft-lr" else arg for arg in args]
    status, sentences = run_command(capsys, *args, "--save-steps", "1", "--eval-steps", "100")
    assert status == 1 and len(sentences) == 1
    assert (
        f"should be finite, but at step 2 of {stage} it is nan: begin a new run with a lower" in sentences[0]
    )
    assert not (out / "model.safetensors").exists()
    assert [folder.name for folder in (out / "checkpoints").iterdir()] == [f"{stage}-1"]
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_an_evaluation_that_is_not_finite_is_logged_as_null(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(stages.DPOStage, "evaluate", lambda *_: {"loss": float("nan"), "kl": float("inf")})
    with pytest.raises(
        TrainingError, match=r"the eval loss should be finite, but at step 0 of dpo it is nan"
    ):
        train(make_config(rows, tmp_path / "out", sft_epochs=0))
    (line,) = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=pytest.fail)
    assert record["loss"] is None and record["kl"] is None


def test_a_last_evaluation_that_is_not_finite_leaves_no_model_to_load(rows, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SMALL_DECODER)
    evaluate, out = stages.DPOStage.evaluate, tmp_path / "out"

    def fail(self, *args):
        metrics = evaluate(self, *args)
        return metrics | {"loss": math.nan} if (out / "model.safetensors").exists() else metrics

    monkeypatch.setattr(stages.DPOStage, "evaluate", fail)
    for _ in range(2):  # the same command does not end better
        with pytest.raises(
            TrainingError, match="the eval loss should be finite, but at step 6 of dpo it is nan"
        ):
            train(make_config(rows, out, sft_epochs=0, epochs=1, save_steps=2, samples=0))
        with pytest.raises(ValueError, match="has not finished"):
            load_pretrained(str(out), None, 128)


DISK_IS_FULL = {
    "system": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "safetensors": SafetensorError("I/O error: No space left on device (os error 28)"),
    "tokenizers": Exception("No space left on device (os error 28)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("library", DISK_IS_FULL)
def test_a_full_disk_gets_one_sentence_and_the_run_resumes(rows, tmp_path, monkeypatch, capsys, library):
    def fail():
        raise DISK_IS_FULL[library]

    monkeypatch.setitem(PRESETS, "tiny", SMALL_DECODER)
    out = tmp_path / "out"
    args = ["train", "--data", rows, "--out", out, "--cpu", "--batch-size", "8", "--max-length", "32"]
    args += ["--sft-epochs", "0", "--epochs", "1", "--save-steps", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_state", after_calls(checkpoint.write_state, 4, fail))
        status, sentences = run_command(capsys, *args)
    assert status == 1 and len(sentences) == 1
    assert "No space left on device" in sentences[0] and "): make room, and the same command" in sentences[0]
    assert sorted(folder.name for folder in (out / "checkpoints").iterdir()) == ["dpo-1", "dpo-2.new"]
    cli.main(list(map(str, args)))
    assert [r["step"] for r in read_metrics(out) if r["part"] == "step"] == [1, 2, 3]


@pytest.mark.slow
def test_random_states_that_cannot_be_loaded_are_told(rows, tmp_path, capsys, monkeypatch):
    options = {"sft_epochs": 0, "epochs": 1, "batch_size": 16, "save_steps": 1}
    fail = after_calls(Trainer.train_step, 2, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train_step", fail)
        train(make_config(rows, tmp_path / "out", **options))
    folder = tmp_path / "out" / "checkpoints" / "dpo-1"
    (folder / "random-0.safetensors").unlink()
    progress = json.loads((folder / "progress.json").read_text())
    del progress["files"]["random-0.safetensors"]  # as of a run of fewer processes
    (folder / "progress.json").write_text(json.dumps(progress))
    train(make_config(rows, tmp_path / "out", resume=True, **options))
    sentence = "The random state of process 0 is not that of the interrupted run: the checkpoint has none."
    assert sentence in capsys.readouterr().out


def test_random_states_come_back():
    def draw():
        return random.random(), random.gauss(0, 1), np.random.randn(), float(torch.rand(()))

    random.gauss(0, 1), np.random.randn()  # of two draws, the second is kept
    state = checkpoint.get_random_state(torch.device("cpu"))
    first = draw()
    checkpoint.set_random_state(state, torch.device("cpu"))
    assert draw() == first != draw()
    assert (
        checkpoint.set_random_state(state, torch.device("meta")) == "the checkpoint was not written on meta"
    )


def test_sigterm_behind_a_sentence_adds_no_other(rows, tmp_path, monkeypatch):
    """torchrun sends it to a process that ends because another has ended."""

    def fail(setup):
        raise TrainingError("another process has ended")

    def exit_slowly(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        exit_with_error(*args, **kwargs)

    exit_with_error, config = cli.exit_with_error, make_config(rows, tmp_path / "out")
    monkeypatch.setattr(command_line, "parse_arguments", lambda _: (config, False))
    monkeypatch.setattr(train_module, "run_training", fail)
    monkeypatch.setattr(cli, "exit_with_error", exit_slowly)
    assert call_in_fork(lambda: cli.main(["train"]), tmp_path / "printed") == 1
    sentence = (tmp_path / "printed").read_text().splitlines()[-1]
    assert sentence == "dpo-wrapper: another process has ended"
