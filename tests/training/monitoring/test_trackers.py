"""Other programs are given the metrics that the log has."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import accelerate.tracking
import pytest
from accelerate.utils import LoggerType

from dpo_wrapper.training.monitoring.trackers import Trackers, check_trackers
from dpo_wrapper.training.run_folder import RunFolder
from dpo_wrapper.training.setup import set_up_training
from dpo_wrapper.training.stopping import TrainingError
from dpo_wrapper.training.train import train
from helpers.runs import make_config


class FakeTracker(ModuleType):
    """A library with the interface of trackio and wandb, as far as accelerate uses it."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.started, self.settings, self.logged, self.is_finished = [], {}, [], False
        self.config = self

    def init(self, **options):
        self.started.append(options)
        return self

    def update(self, settings, **_):
        self.settings |= settings

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.is_finished = True


@pytest.fixture(params=["trackio", pytest.param("wandb", marks=pytest.mark.slow)])
def library(request, monkeypatch):
    library = FakeTracker(request.param)
    monkeypatch.setitem(sys.modules, request.param, library)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType(request.param)])
    return library


def test_trackers_get_finite_values_and_settings(library, tmp_path):
    config = make_config(
        tmp_path / "rows", tmp_path / "first", report_to=(library.__name__,), project="tests"
    )
    run = RunFolder(config)
    with Trackers(config, run) as trackers:
        trackers.log("dpo", "step", 7, {"loss": 0.5, "kl": float("nan")})
        trackers.log("dpo", "eval", 7, {"loss": 0.25})
    assert library.logged == [(7, {"dpo/loss": 0.5}), (7, {"dpo/eval/loss": 0.25})]
    assert library.settings["batch_size"] == 4 and library.settings["eval_data"] == "None"
    assert "resume" not in library.settings  # MLflow refuses a setting that has changed
    (options,) = library.started
    assert options["project"] == "tests" and options["name"].startswith("first-")
    assert options["resume"] == "allow"
    assert library.is_finished


@pytest.mark.slow
def test_a_run_reports_all_its_stages_on_one_axis(library, rows, tmp_path):
    options = {"epochs": 1, "batch_size": 8, "max_length": 16, "samples": 0}
    config = make_config(rows, tmp_path / "out", report_to=(library.__name__,), **options)
    train(config)
    steps = {
        stage: [step for step, values in library.logged if f"{stage}/lr" in values]
        for stage in ("sft", "dpo")
    }
    assert steps == {"sft": [1, 2, 3], "dpo": [4, 5, 6]}
    assert [step for step, values in library.logged if "dpo/eval/loss" in values] == [3, 6]
    records = RunFolder(config).log.read()
    for record, (_, values) in zip(records, library.logged, strict=True):
        place = (record.pop("stage"), record.pop("part"), record.pop("step"))
        prefix = place[0] if place[1] == "step" else f"{place[0]}/{place[1]}"
        assert values == {f"{prefix}/{name}": value for name, value in record.items()}


def test_a_tracker_that_does_not_start_is_told(library, tmp_path, monkeypatch):
    def fail(**_):
        raise RuntimeError("no API key:\nlog in first")

    monkeypatch.setattr(library, "init", fail)
    config = make_config(tmp_path / "rows", tmp_path / "out", report_to=(library.__name__,))
    expected = r"should start its trackers, but .*\(no API key: log in first\): mend that"
    with pytest.raises(TrainingError, match=expected):
        Trackers(config, RunFolder(config))


def test_a_missing_library_is_named_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_wrapper.training.monitoring.trackers.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"^--report-to mlflow needs mlflow, .*: pip install mlflow\.$"):
        check_trackers(["mlflow"])
    with pytest.raises(ImportError, match=r"pip install tensorboard\.$"):
        set_up_training(make_config(tmp_path / "no file", tmp_path / "out", report_to=("tensorboard",)))
