"""What is printed and logged while a stage runs."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from dpo_wrapper.training.monitoring.monitor import Monitor
from dpo_wrapper.training.monitoring.trackers import Trackers
from dpo_wrapper.training.run_folder import RunFolder
from dpo_wrapper.training.schedule import Schedule
from helpers.runs import make_config


@pytest.fixture
def run(tmp_path):
    run = RunFolder(make_config(tmp_path / "rows", tmp_path / "out"))
    run.open()
    return run


def watch(run, schedule, steps_done=0, is_main_process=True):
    accelerator = SimpleNamespace(is_main_process=is_main_process, device=torch.device("cpu"))
    trackers = Trackers(make_config("rows", "out"), run)
    return Monitor(run, accelerator, "dpo", "pairs", schedule, steps_done, trackers, 0)


def step_metrics(num_pairs, accuracy):
    counts = {"pairs/valid": num_pairs, "tokens/unique": 10.0 * num_pairs, "tokens/padded": 30.0 * num_pairs}
    return {"loss": 0.5, "rewards/accuracies": accuracy, "kl/chosen": -accuracy, **counts}


def test_a_line_tells_of_all_pairs_since_the_last_one(run, capfd):
    with watch(run, Schedule(5, logging_steps=2, eval_steps=5, save_steps=0, sample_steps=0)) as monitor:
        for step, (num_pairs, accuracy) in enumerate([(2, 0.5), (6, 1.0), (2, 0.5), (6, 0.5), (1, 1.0)]):
            monitor.log_step(step + 1, step_metrics(num_pairs, accuracy), num_pairs, seconds=0.5)
    printed = capfd.readouterr()
    lines = printed.out.splitlines()
    assert [line.split("  loss")[0] for line in lines] == ["dpo 1/5", "dpo 2/5", "dpo 4/5", "dpo 5/5"]
    assert "accuracy  50%  chosen  -0.50      40 tokens/s (padded 120)" in lines[0]
    assert "accuracy 100%" in lines[1]
    assert "accuracy  50%  chosen  -0.50      80 tokens/s (padded 240)" in lines[2]  # 8 pairs in a second
    assert printed.err == ""  # a file has no use for a bar


def test_a_mean_over_pairs_is_no_mean_of_means(run, capsys):
    with watch(run, Schedule(9, logging_steps=3, eval_steps=9, save_steps=0, sample_steps=0)) as monitor:
        for step, (num_pairs, accuracy) in enumerate([(1, 0.0), (1, 0.0), (8, 1.0)], start=1):
            monitor.log_step(step, step_metrics(num_pairs, accuracy), num_pairs, seconds=0.5)
    assert "accuracy  89%" in capsys.readouterr().out.splitlines()[-1]  # 8 of the 9 since the first line


def test_the_time_left_has_evaluations_in_lines_and_bar_and_after_a_resume(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    for part, seconds in (("eval", 60.0), ("train", 600.0), ("step", 9.0)):
        run.log.append("dpo", part, 4, {"seconds": seconds})
    run.log.append("sft", "eval", 4, {"seconds": 7000.0})
    schedule = Schedule(9, logging_steps=1, eval_steps=8, save_steps=0, sample_steps=0)
    with watch(run, schedule, steps_done=4) as monitor:
        monitor.log_step(5, step_metrics(2, 0.5), 2, seconds=15.0)
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].endswith("  13:00 left")  # 4 steps, 2 evaluations, one of train pairs
    assert "loss 0.5000, 13:00 left]" in printed.err and "<" not in printed.err


def test_the_log_has_the_speed_of_each_step(run):
    with watch(run, Schedule(5, logging_steps=2, eval_steps=5, save_steps=0, sample_steps=0)) as monitor:
        monitor.log_step(1, step_metrics(2, 0.5), 2, seconds=0.5)
    (record,) = run.log.read()
    speeds = {name: record[name] for name in record if name.endswith("/second")}
    assert speeds == {"pairs/second": 4.0, "unique_tokens/second": 40.0, "padded_tokens/second": 120.0}
    assert record["seconds"] == 0.5 and record["elapsed_seconds"] > 0 and 0.05 < record["memory_gb"] < 100


def test_other_processes_are_silent(run, capfd):
    schedule = Schedule(5, logging_steps=1, eval_steps=5, save_steps=0, sample_steps=0)
    with watch(run, schedule, is_main_process=False) as monitor:
        monitor.log_step(1, step_metrics(2, 0.5), 2, seconds=0.5)
        with monitor.measure("eval", "evaluating"):
            pass
        monitor.log_evaluation("eval", 1, {"loss": 0.5}, 3)
    assert run.log.read() == [] and capfd.readouterr().out == ""


def test_time_goes_on_where_an_interrupted_run_stopped(run):
    run.log.append("sft", "step", 1, {"elapsed_seconds": 5000.0})
    with run.new_checkpoint(Accelerator(cpu=True), "sft", 1):
        pass
    run.log.append("sft", "step", 2, {"elapsed_seconds": 9000.0})  # will be done again
    settings = json.loads(run.run_file.read_text())["settings"]
    resumed = RunFolder(make_config(settings["data"], run.path, resume=True))
    resumed.record.settings["data"] = settings["data"]
    resumed.check(resume=True)
    resumed.open()
    assert 5000.0 < resumed.elapsed_seconds() < 5900.0
    assert resumed.record.run_id == run.record.run_id
