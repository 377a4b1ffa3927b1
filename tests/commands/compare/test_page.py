"""What the page of a comparison says of the settings of its runs."""

import pytest

from dpo_wrapper.commands.compare.config import parse_arguments
from dpo_wrapper.commands.compare.page import compare_settings, format_differences
from dpo_wrapper.commands.compare.results import RunResult
from dpo_wrapper.commands.compare.runs import list_runs
from helpers.html_pages import Page


@pytest.fixture
def make_results(tmp_path):
    """A comparison, and results whose logs have a warm-up to the given rate and so many steps."""

    def make(arguments, **schedules):
        options = [*arguments, "--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]
        comparison = parse_arguments(options)
        results = []
        for run in list_runs(comparison):
            num_steps, rate = schedules[run.name.replace("-", "_")]
            rates = {step: rate * min(step / 2, 1.0) for step in range(1, num_steps + 1)}
            log = [{"stage": "dpo", "part": "step", "step": step, "lr": lr} for step, lr in rates.items()]
            log.append({"stage": "dpo", "part": "eval", "step": num_steps})
            results.append(RunResult(run, log, [], [], []))
        return comparison, results

    return make


def test_steps_and_learning_rate_are_told_once_where_they_are_the_same(make_results):
    arguments = ["--losses", "sigmoid", "ipo", "--seeds", "1", "--epochs", "2", "--batch-size", "4"]
    comparison, results = make_results(arguments, sigmoid_seed0=(1200, 1e-4), ipo_seed0=(1200, 1e-4))
    common, different = compare_settings(comparison, results)
    assert common["dpo steps"] == "1,200" and common["dpo peak learning rate"] == "0.0001"
    assert (common["epochs"], common["batch size"]) == ("2", "4")
    assert not {"loss", "seed", "data"} & common.keys()
    assert different == {"--loss": {"sigmoid": "sigmoid", "ipo": "ipo"}}


def test_steps_and_learning_rates_that_differ_stand_in_a_table(make_results, tmp_path):
    recipes = [tmp_path / "fast.yaml", tmp_path / "slow.yaml"]
    for file, rate in zip(recipes, ("1e-3", "1e-5"), strict=True):
        file.write_text(f"learning-rate: {rate}\n")
    fast, slow = (10, 1e-3), (10, 1e-5)
    schedules = {"fast_seed0": fast, "slow_seed0": slow, "fast_seed1": (8, 1e-3), "slow_seed1": slow}
    comparison, results = make_results([*map(str, recipes), "--seeds", "2"], **schedules)
    common, different = compare_settings(comparison, results)
    assert not {"dpo steps", "dpo peak learning rate", "learning rate"} & common.keys()
    assert different["dpo steps"] == {"fast": "10, 8", "slow": "10"}
    cells = Page(format_differences(["fast", "slow", "failed"], different)).texts
    assert cells["td"] == ["10, 8", "0.001", "0.001", "10", "1e-05", "1e-05", "-", "-", "-"]
