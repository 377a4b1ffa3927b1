"""Comparisons: runs, their results, the page, and what is done when they are interrupted or fail."""

import json
import signal
import time
from dataclasses import replace
from html import unescape

import pytest
import torch
from safetensors.torch import load_file

from dpo_wrapper.commands.compare import run as run_module
from dpo_wrapper.commands.compare.config import parse_arguments
from dpo_wrapper.commands.compare.run import compare
from dpo_wrapper.commands.compare.runs import RunFailedError, list_runs, train_run
from dpo_wrapper.training.train import train
from helpers.browser import check_page, needs_browser
from helpers.datasets import write_rows
from helpers.forked_scripts import ForkedCommand
from helpers.lora_runs import save_decoder
from helpers.runs import BUNDLED, QUICK, ROOT, make_config

LOSSES = ["--losses", "sigmoid", "simpo", "--seeds", "2", "--max-steps", "4"]
OPTIONS = "--epochs 100 --batch-size 8 --max-length 128 --samples 1 --exact-answers 0 --eval-steps 2 --cpu"


def list_options(rows, model, out):
    return ["--data", str(rows), "--model", str(model), "--out", str(out), *OPTIONS.split()]


@pytest.fixture
def rows(tmp_path):
    """25 pairs to train on and 6 to evaluate on."""
    lines = BUNDLED.read_text(encoding="utf-8").splitlines()[:31]
    return write_rows(tmp_path / "rows.jsonl", [json.loads(line) for line in lines])


@pytest.fixture
def decoder(tmp_path, small_decoder):
    return save_decoder(tmp_path / "decoder")


@pytest.fixture
def make_comparison(rows, tmp_path, decoder):
    """What makes a comparison of some arguments, with options of short runs."""

    def make(*arguments):
        return parse_arguments([*list_options(rows, decoder, tmp_path / "out"), *arguments])

    return make


@pytest.fixture
def in_process(monkeypatch):
    """Runs are trained in this process, which is faster; the names of those that were."""
    trained = []

    def train_here(run):
        trained.append(run.name)
        run.log_file.parent.mkdir(parents=True, exist_ok=True)
        train(run.config)

    monkeypatch.setattr(run_module, "train_run", train_here)
    return trained


@needs_browser
@pytest.mark.slow
def test_a_comparison_and_what_is_done_again(make_comparison, in_process, tmp_path, capsys):
    out = tmp_path / "out"
    assert compare(make_comparison(*LOSSES)) == 0
    assert in_process == ["sigmoid-seed0", "simpo-seed0", "sigmoid-seed1", "simpo-seed1"]
    content = json.loads((out / "comparison.json").read_text())
    assert all(sentence in capsys.readouterr().out for sentence in content["conclusions"][:1])
    scores = [
        [json.loads(line) for line in (out / "evaluations" / name / "scores.jsonl").read_text().splitlines()]
        for name in in_process
    ]
    assert len({tuple(one["source"] for one in lines) for lines in scores}) == 1  # the rows of all seeds
    means = [sum(one["rewards/accuracies"] for one in lines) / len(lines) for lines in scores]
    of_simpo = content["results"]["reward accuracy"]["means"]["simpo"]
    assert of_simpo["value"] == pytest.approx((means[1] + means[3]) / 2)
    assert of_simpo["low"] <= of_simpo["value"] <= of_simpo["high"]
    page = unescape((out / "report.html").read_text())
    assert all(text in page for text in ("What the numbers support", *content["conclusions"]))
    check_page(out / "report.html")

    compare(make_comparison(*LOSSES))
    assert len(in_process) == 4  # nothing is trained again, and the result is the same
    assert json.loads((out / "comparison.json").read_text()) == content
    compare(make_comparison("--losses", "sigmoid", "simpo", "ipo", "--seeds", "1", "--max-steps", "4"))
    assert in_process[4:] == ["ipo-seed0"]
    with pytest.raises(ValueError, match=r"it had --batch-size 8: give the same, or name a new folder"):
        compare(make_comparison(*LOSSES, "--batch-size", "4"))


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_others(make_comparison, in_process, monkeypatch, tmp_path):
    train_in_process = run_module.train_run

    def fail_sometimes(run):
        if run.name == "simpo-seed1":
            raise RunFailedError("the loss should be finite, but it is nan.", 1)
        train_in_process(run)

    monkeypatch.setattr(run_module, "train_run", fail_sometimes)
    assert compare(make_comparison(*LOSSES)) == 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert "simpo-seed1 failed" in page and "the loss should be finite, but it is nan." in page
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert content["failures"] == {"simpo-seed1": "the loss should be finite, but it is nan."}


@pytest.mark.slow
def test_a_contestant_that_refuses_the_data_leaves_the_others(rows, tmp_path, decoder):
    """KTO needs completions of other prompts, and there is one eval prompt."""
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    known = [row for row in lines if row["split"] != "test"]
    known.append(next(row for row in lines if row["split"] == "test"))
    options = list_options(write_rows(tmp_path / "one.jsonl", known), decoder, tmp_path / "out")
    arguments = ["--losses", "kto", "sigmoid", "--seeds", "1", "--max-steps", "1"]
    assert compare(parse_arguments([*options, *arguments])) == 1
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert content["failures"]["kto-seed0"].startswith("KTO estimates a KL from completions of other")
    assert content["conclusions"] == ["Nothing can be compared, for fewer than two contestants have results."]
    page = unescape((tmp_path / "out" / "report.html").read_text())
    assert content["failures"]["kto-seed0"] in page and content["conclusions"][0] in page


def test_a_comparison_ends_where_all_contestants_refuse_the_data(make_comparison, monkeypatch):
    tried = []

    def refuse(run):
        tried.append(run.name)
        raise RunFailedError("the path should be a file, but it does not exist: check the path.", 2)

    monkeypatch.setattr(run_module, "train_run", refuse)
    with pytest.raises(ValueError, match="the path should be a file"):
        compare(make_comparison(*LOSSES))
    assert tried == ["sigmoid-seed0", "simpo-seed0"]


@pytest.mark.slow
@pytest.mark.parametrize("is_all", [False, True])
def test_a_model_that_was_trained_on_eval_rows_is_compared_on_others(
    rows, tmp_path, decoder, in_process, is_all
):
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    known = [row for row in lines if row["split"] == "test"][: None if is_all else 2]
    earlier = write_rows(tmp_path / "earlier.jsonl", [row | {"split": "train"} for row in known])
    options = QUICK | {"model": str(decoder), "sft_epochs": 0, "eval_fraction": 0.0}
    train(make_config(earlier, tmp_path / "trained", **options))
    recipes = [tmp_path / f"{name}.yaml" for name in ("fresh", "trained")]
    for file, model in zip(recipes, (decoder, tmp_path / "trained"), strict=True):
        file.write_text(f"model: {model}\n")
    arguments = ["--data", str(rows), "--out", str(tmp_path / "out"), *OPTIONS.split(), "--max-steps", "1"]
    assert compare(parse_arguments([*map(str, recipes), *arguments, "--seeds", "1"])) == 0
    evaluations = tmp_path / "out" / "evaluations"
    files = [evaluations / f"{name}-seed0" / "scores.jsonl" for name in ("fresh", "trained")]
    fresh, trained = (len(file.read_text().splitlines()) for file in files)
    assert fresh == trained + (0 if is_all else 2)
    conclusions = json.loads((tmp_path / "out" / "comparison.json").read_text())["conclusions"]
    assert any(one.startswith("trained was trained on all its eval pairs: ") for one in conclusions) == is_all
    assert f"<dt>eval pairs</dt><dd>{trained}</dd>" in (tmp_path / "out" / "report.html").read_text()


def test_a_folder_of_something_else_is_refused(make_comparison, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(
        ValueError, match="--out should be a new folder, an empty one or that of a comparison"
    ):
        compare(make_comparison(*LOSSES))


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(make_comparison, rows, tmp_path, decoder):
    """SIGTERM in the middle of the first run, which then ends in the weights that it would have had."""
    out = tmp_path / "out"
    arguments = ["--losses", "sigmoid", "ipo", "--seeds", "1", "--max-steps", "150", "--eval-steps", "1000"]
    options = [*list_options(rows, decoder, out), *arguments]
    command = ForkedCommand(tmp_path / "printed", ROOT, "dpo-wrapper", "compare", *options)
    log = out / "runs" / "sigmoid-seed0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count('"step"') > 5) and time.monotonic() < deadline:
        time.sleep(0.05)
    command.process.send_signal(signal.SIGTERM)
    assert command.status == 128 + signal.SIGTERM
    assert "the comparison was interrupted; the same command goes on with it" in command.errors
    assert [*(out / "runs" / "sigmoid-seed0" / "checkpoints").iterdir()]

    run = list_runs(make_comparison(*arguments))[0]
    train_run(run)
    train(replace(run.config, out=tmp_path / "whole"))
    one, other = (load_file(folder / "model.safetensors") for folder in (run.folder, tmp_path / "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)
