"""Run folders, of which something is broken: a kill in the middle of a write, a planted file, no room."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from dpo_wrapper.pretrained import load_pretrained
from dpo_wrapper.training import checkpoint, state_files
from dpo_wrapper.training.monitoring import figure
from dpo_wrapper.training.run_folder import RunFolder
from dpo_wrapper.training.state_files import read_state, write_state
from dpo_wrapper.training.stopping import TrainingError
from dpo_wrapper.training.train import train
from helpers.runs import interrupt_training, make_config, read_metrics

PROCESS = Accelerator(cpu=True)


class KilledError(BaseException):
    """No handler of the package catches it."""


class FileChanges:
    """Calls `on_change` at each change of a file that a run makes, which is half made then."""

    def __init__(self, monkeypatch):
        self.on_change = lambda: None
        monkeypatch.setattr(os, "fsync", lambda _: None)  # it takes longer than all else
        for module, name, half in (
            (os, "rename", None),
            (os, "replace", None),
            (shutil, "rmtree", self.remove_half),
            (state_files, "save_file", self.save_half),
            (Path, "write_text", self.write_half),
        ):
            monkeypatch.setattr(module, name, self.watched(getattr(module, name), half))

    def watched(self, function, half):
        def wrapped(*args, **kwargs):
            if half is not None:
                half(*args)
            self.on_change()
            return function(*args, **kwargs)

        return wrapped

    def write_half(self, file, text, *_):
        with open(file, "w") as opened:
            opened.write(text[: len(text) // 2])

    def save_half(self, tensors, file):
        with open(file, "wb") as opened:
            opened.write(bytes(20))

    def remove_half(self, folder):
        for file in [file for file in folder.iterdir() if file.is_file()][:1]:
            file.unlink()

    def kill(self, at, function, *args):
        """End the process of a call, as it were, at its change number `at`, if it has so many."""
        num_changes = 0

        def count():
            nonlocal num_changes
            num_changes += 1
            if num_changes == at:
                raise KilledError

        self.on_change = count
        try:
            function(*args)
        except KilledError:
            return True
        finally:
            self.on_change = lambda: None
        return False


@pytest.fixture
def changes(monkeypatch):
    return FileChanges(monkeypatch)


def reopen(rows, out, limit=1):
    """The run of a new process in a folder."""
    run = RunFolder(make_config(rows, out, save_total_limit=limit))
    run.check(resume=False)
    return run


def write_checkpoints(run, last_step, completed):
    """What a run does with its folder; the number of steps done is all of its state."""
    run.open()
    done = run.progress.step
    if done:
        assert read_state(run.checkpoint_folder / checkpoint.STATE_FILE) == {"step": done}
    for step in range(done + 1, last_step + 1):
        run.log.append("sft", "step", step, {"loss": 1.0})
        with run.new_checkpoint(PROCESS, "sft", step) as folder:
            write_state(folder / checkpoint.STATE_FILE, {"step": step})
        completed.append(step)


@pytest.mark.parametrize("limit", [1, 2])
def test_whenever_a_run_is_killed_its_newest_checkpoint_is_whole(rows, tmp_path, changes, limit):
    for at in range(1, 100):
        out, completed = tmp_path / str(at), [0]
        is_killed = changes.kill(at, write_checkpoints, reopen(rows, out, limit), 3, completed)
        for again in (at % 8 + 1, at % 5 + 1):  # and once more, and again, while it resumes
            run = reopen(rows, out, limit)
            assert run.progress.step >= completed[-1]
            changes.kill(again, write_checkpoints, run, 5, completed)
        run = reopen(rows, out, limit)
        write_checkpoints(run, 5, completed)
        assert [record["step"] for record in run.log.read()] == [1, 2, 3, 4, 5]
        kept = {path.name for path in run.checkpoints.path.iterdir()}
        assert kept == ({"sft-5", "sft-4"} if limit == 2 else {"sft-5"})
        if not is_killed:
            break
    assert 15 < at < 99


class Planted:
    path: Path

    def __reduce__(self):
        return os.mkdir, (str(Planted.path),)


@pytest.mark.slow
def test_resuming_runs_no_code_of_the_folder(rows, tmp_path):
    out, Planted.path = tmp_path / "out", tmp_path / "ran"
    with interrupt_training("dpo", after_steps=3):
        train(make_config(rows, out, save_steps=2))
    folder = out / "checkpoints" / "dpo-2"
    names = {path.name for path in folder.iterdir()}
    assert names == {"progress.json", "random-0.safetensors", "state.safetensors"}
    for name in ("optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "pytorch_model.bin"):
        torch.save(Planted(), folder / name)
    train(make_config(rows, out, save_steps=2, resume=True))
    assert not Planted.path.exists()
    (tmp_path / "state.safetensors").write_bytes(pickle.dumps(Planted()))
    with pytest.raises(TrainingError, match=r"part of a checkpoint, but it cannot be read .*: delete"):
        read_state(tmp_path / "state.safetensors")
    assert not Planted.path.exists()


def test_a_state_comes_back_as_it_was(tmp_path):
    weight = torch.randn(3, 4)
    state = {
        "step": 3,
        "nested": {0: {"exp_avg": torch.randn(2, 2).bfloat16(), "step": torch.tensor(5.0)}, 7: {}},
        "groups": [{"betas": (0.9, 0.999), "lr": 1e-3 / 3, "name": None, "amsgrad": False, "ids": [0, 1]}],
        "tied": {"head": weight, "embedding": weight},
        "views": (weight[1], weight.T, torch.empty(0), torch.zeros(0, 2, dtype=torch.uint8)),
        "is_nan": float("inf"),
    }
    write_state(tmp_path / "state", state)
    read = read_state(tmp_path / "state")

    def check(one, other):
        assert type(one) is type(other)
        if isinstance(one, dict):
            assert list(one) == list(other)
            one, other = list(one.values()), list(other.values())
        if isinstance(one, (list, tuple)):
            for part, other_part in zip(one, other, strict=True):
                check(part, other_part)
        elif isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other)
        else:
            assert one == other

    check(state, read)
    assert (tmp_path / "state").stat().st_size < 3000  # tied weights are written once
    with pytest.raises(TypeError, match="should hold tensors"):
        write_state(tmp_path / "state", {"set": {1}})


def test_a_log_without_a_checkpoint_is_kept(rows, tmp_path, capsys):
    with interrupt_training("sft", after_steps=3):
        train(make_config(rows, tmp_path / "out", save_steps=0))
    logged = (tmp_path / "out" / "metrics.jsonl").read_text()
    with interrupt_training("sft", after_steps=1):
        train(make_config(rows, tmp_path / "out", save_steps=0, resume=True))
    assert (tmp_path / "out" / "metrics.1.jsonl").read_text() == logged
    printed = capsys.readouterr().out
    assert f"beginning the run in {tmp_path / 'out'} again, for it has no checkpoint\n" in printed
    assert "what it had logged is in metrics.1.jsonl\n" in printed


def test_settings_that_cannot_be_read_get_a_sentence(rows, tmp_path):
    (tmp_path / "out").mkdir()
    for text in ("", "[]", "{}"):
        (tmp_path / "out" / "run.json").write_text(text)
        with pytest.raises(ValueError, match=r"run.json should hold the settings of a run, but it does not"):
            RunFolder(make_config(rows, tmp_path / "out")).check(resume=True)


@pytest.mark.slow
def test_a_run_without_its_report_makes_it(rows, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise KilledError

    out, options = tmp_path / "out", {"sft_epochs": 0, "epochs": 1}
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(figure, "plot_curves", broken)
        train(make_config(rows, out, **options))
    assert not (out / "curves.png").exists()
    metrics = read_metrics(out)
    load_pretrained(str(out), None, 128)
    capsys.readouterr()
    train(make_config(rows, out, resume=True, **options))
    assert (out / "curves.png").exists() and "reward accuracy" in capsys.readouterr().out
    assert read_metrics(out) == metrics
    with pytest.raises(ValueError, match="is finished"):
        train(make_config(rows, out, resume=True, **options))
