"""An interrupted run resumes to the same result, and only with the settings that it began with."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from dpo_wrapper.pretrained import load_pretrained
from dpo_wrapper.training.checkpoint import STATE_FILE
from dpo_wrapper.training.evaluator import Evaluator
from dpo_wrapper.training.run_folder import RunFolder
from dpo_wrapper.training.train import train
from dpo_wrapper.training.trainer import Trainer
from helpers.runs import InterruptedRunError, interrupt_training, make_config, read_metrics


def raise_interrupted(*_):
    raise InterruptedRunError


@pytest.mark.slow
@pytest.mark.parametrize("stage, after_steps", [("sft", 3), ("dpo", 1), ("dpo", 7)])
def test_an_interrupted_run_resumes_to_the_same_result(
    finished_run, rows, tmp_path, stage, after_steps, capsys
):
    out = tmp_path / "out"
    with interrupt_training(stage, after_steps=after_steps):
        train(make_config(rows, out, save_steps=2))
    torch.manual_seed(999)  # whatever the state of the new process
    capsys.readouterr()
    train(make_config(rows, out, save_steps=2, resume=stage == "sft"))
    step = after_steps // 2 * 2
    place = f"after step {step} of {stage}" if step else f"at the beginning of {stage}"
    assert f"continuing {out} {place}\n" in capsys.readouterr().out
    assert read_metrics(out) == read_metrics(finished_run)
    assert (out / "model.safetensors").read_bytes() == (finished_run / "model.safetensors").read_bytes()


def test_a_run_without_preference_training_ends_after_supervised_training(rows, tmp_path, monkeypatch):
    out = tmp_path / "out"
    config = make_config(rows, out, epochs=0, save_steps=0, samples=0)
    with monkeypatch.context() as patch, pytest.raises(InterruptedRunError):
        patch.setattr(RunFolder, "finish", raise_interrupted)
        train(config)
    assert json.loads((out / "run.json").read_text())["status"] == "trained"
    train(config)
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    assert {record["stage"] for record in read_metrics(out)} == {"sft"}
    assert (out / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("is_removed", [False, True])
def test_a_damaged_checkpoint_is_left_out(finished_run, rows, tmp_path, capsys, is_removed):
    out = tmp_path / "out"
    with interrupt_training("dpo", after_steps=5):
        train(make_config(rows, out, save_steps=2, save_total_limit=3))
    assert sorted(os.listdir(out / "checkpoints")) == ["dpo-0", "dpo-2", "dpo-4"]
    if is_removed:
        shutil.rmtree(out / "checkpoints" / "dpo-4")
        problem = "dpo-4 is not there"
    else:
        size = (out / "checkpoints" / "dpo-4" / STATE_FILE).stat().st_size
        os.truncate(out / "checkpoints" / "dpo-4" / STATE_FILE, 2000)
        problem = f"state.safetensors of dpo-4 has 2,000 bytes in place of {size:,}"
    shutil.copytree(out, tmp_path / "lost")
    capsys.readouterr()
    train(make_config(rows, out, save_steps=5))
    printed = capsys.readouterr().out
    assert f"a checkpoint is left out: {problem}\ncontinuing {out} after step 2 of dpo\n" in printed
    assert read_metrics(out) == read_metrics(finished_run)
    assert (out / "model.safetensors").read_bytes() == (finished_run / "model.safetensors").read_bytes()
    for name in ("dpo-0", "dpo-2"):
        shutil.rmtree(tmp_path / "lost" / "checkpoints" / name)
    sentence = f"checkpoints should hold a whole checkpoint, but {problem}: put it back, or name a new folder"
    with pytest.raises(ValueError, match=sentence):
        train(make_config(rows, tmp_path / "lost", save_steps=5))
    assert os.listdir(tmp_path / "lost" / "checkpoints") == ([] if is_removed else ["dpo-4"])


@pytest.mark.slow
def test_the_model_of_the_stage_before_is_needed(rows, tmp_path):
    out = tmp_path / "out"
    with interrupt_training("dpo", after_steps=1):
        train(make_config(rows, out))
    (out / "sft").rename(tmp_path / "elsewhere")
    sentence = f"{out / 'sft'} should hold the model that the stage dpo began with, but it is not there: put"
    with pytest.raises(ValueError, match=sentence):
        train(make_config(rows, out))


@pytest.mark.slow
def test_the_running_mean_of_a_loss_resumes(rows, tmp_path, monkeypatch):
    """BetaDPO's, which a checkpoint carries, and which one process moves once a step."""
    train_step, seen = Trainer.train_step, []

    def record_gap(self, *args):
        values = train_step(self, *args)
        statistics = self.stage.dpo.loss.first_loss.statistics
        seen.append((float(statistics.mean), float(statistics.std)))
        if len(seen) == interrupt_after:
            raise InterruptedRunError
        return values

    monkeypatch.setattr(Trainer, "train_step", record_gap)
    options = {"loss": "betadpo(k=0.1, drop=0.2) + 0.5*sft", "sft_epochs": 0, "save_steps": 2}
    interrupt_after = 0
    train(make_config(rows, tmp_path / "whole", **options))
    whole, interrupt_after = seen.copy(), 3
    assert len(whole) > 3 and len({mean for mean, _ in whole}) == len(whole)
    seen.clear()
    with pytest.raises(InterruptedRunError):
        train(make_config(rows, tmp_path / "out", **options))
    interrupt_after = 0
    train(make_config(rows, tmp_path / "out", resume=True, **options))
    assert seen[3:] == whole[2:]  # step 3 was done once more, from the checkpoint after step 2


class KilledError(BaseException):
    """No handler of the package catches it."""


@pytest.mark.slow
@pytest.mark.parametrize("save_steps", [5, 0])
def test_the_model_is_saved_before_the_last_evaluation(finished_run, rows, tmp_path, monkeypatch, save_steps):
    """Killed in this evaluation, a run evaluates again if there is a checkpoint, and is never lost."""
    evaluate, out = Evaluator.evaluate, tmp_path / "out"

    def killed_evaluation(self, step, name, examples, needs_answers=False):
        if (self.stage.name, step, name) == ("dpo", self.schedule.num_steps, "train"):
            raise KilledError
        return evaluate(self, step, name, examples, needs_answers)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(Evaluator, "evaluate", killed_evaluation)
        train(make_config(rows, out, save_steps=save_steps))
    weights = (finished_run / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == weights
    load_pretrained(str(out), None, 128)
    steps, train_step = [], Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda *args: steps.append(args) or train_step(*args))
    train(make_config(rows, out, save_steps=save_steps, resume=True))
    assert steps == [] and (out / "model.safetensors").read_bytes() == weights
    log = read_metrics(out)
    expected = read_metrics(finished_run)
    assert log == (expected if save_steps else expected[:-1])
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    assert not (out / "checkpoints").exists() and (out / "curves.png").exists()


def test_resume_is_refused_with_other_settings(rows, tmp_path):
    with interrupt_training("sft", after_steps=0):
        train(make_config(rows, tmp_path / "out"))
    changed = {"batch_size": 8, "max_steps": 3, "warmup_ratio": 0.5, "keep_best": True, "stage": ("dpo",)}
    sentence = (
        "a run should be continued with the settings that it began with, but that in .* had "
        r"no --keep-best \(now --keep-best\), no --stage \(now --stage dpo\), --batch-size 4 "
        r"\(now --batch-size 8\), no --max-steps \(now --max-steps 3\), --warmup-ratio 0\.1 "
        r"\(now --warmup-ratio 0\.5\): give the same, or"
    )
    for resume in (False, True):
        with pytest.raises(ValueError, match=sentence):
            train(make_config(rows, tmp_path / "out", resume=resume, **changed))


def test_a_finished_run_is_not_resumed_and_an_unfinished_one_is_no_model(finished_run, rows, tmp_path):
    settings = json.loads((finished_run / "run.json").read_text())["settings"]
    for resume in (False, True):
        with pytest.raises(ValueError, match="is finished: name a new folder"):
            RunFolder(make_config(Path(settings["data"][0]), finished_run)).check(resume=resume)
    with pytest.raises(ValueError, match=r"needs an unfinished run, but .* holds no run: leave it out"):
        RunFolder(make_config(rows, tmp_path / "nothing")).check(resume=True)
    (tmp_path / "other").mkdir()
    for name in ("run.json.new", "run.lock"):  # of a run that was killed at once
        (tmp_path / "other" / name).touch()
    RunFolder(make_config(rows, tmp_path / "other")).check(resume=False)
    (tmp_path / "other" / "letter.txt").touch()
    for resume, sentence in ((False, "is not empty: name a new folder"), (True, "name the folder of one")):
        with pytest.raises(ValueError, match=sentence):
            RunFolder(make_config(rows, tmp_path / "other")).check(resume=resume)
    RunFolder(make_config(rows, tmp_path / "begun")).open()
    with pytest.raises(ValueError, match="has not finished"):
        load_pretrained(str(tmp_path / "begun"), None, 128)
