"""report.html of a run: what a person reads of it, also in a browser."""

import json
import shutil
from dataclasses import replace

import pytest

from dpo_wrapper.evaluation.report import list_before_and_after
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.run_page import format_explanations, format_results, format_sample, list_settings
from dpo_wrapper.training.train import train
from helpers.browser import check_page, needs_browser, take_picture
from helpers.html_pages import Page, check_references
from helpers.runs import make_config

SCRIPT = "<script>document.title = 'changed'</script> & </style></body>"


@pytest.fixture(scope="session")
def page(finished_run):
    return (finished_run / "report.html").read_text(encoding="utf-8")


def test_a_run_has_a_page_of_its_own(page, finished_run):
    check_references(page)
    texts = Page(page).texts
    assert texts["h1"] == texts["title"] == ["out"]
    assert texts["h2"] == [
        "What was trained on what", "Before and after preference training", "What the run said", "Curves",
        "Samples", "Time, speed and memory", "How to use it",
    ]  # fmt: skip
    assert texts["p"][0].startswith("A new decoder (tiny), trained with dpo-wrapper")
    assert str(finished_run.parent) not in page, "a path of this machine"


def test_what_was_trained_stands_with_its_counts(page):
    texts = Page(page).texts
    assert {"21 completions", "5 completions", "21 pairs", "5 pairs"} <= set(texts["td"])
    settings = dict(zip(texts["dt"], texts["dd"], strict=False))
    assert settings["data"] == "rows.jsonl" and settings["loss"] == "sigmoid(beta=0.1) + 1.0*sft"
    assert "Reference: a frozen copy of the model as it is after sft." in texts["p"]


def test_the_table_is_that_of_the_terminal_with_its_errors(finished_run):
    log = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in log if record["stage"] == "dpo"]
    _, rows = list_before_and_after(records)
    [accuracy, error, margin] = rows[:3]
    shown = Page(format_results(records)).texts
    pairs = zip(accuracy[1:], error[1:], strict=True)
    assert shown["td"][:4] == [one if other == "-" else f"{one} ± {other}" for one, other in pairs]
    assert "±" in shown["td"][0]
    assert shown["td"][4:8] == margin[1:] and "standard error" not in shown["th"]
    assert "Behind ± is the standard error" in shown["p"][0]
    without = format_results([{"part": "eval", "loss": 1.0}])
    assert (
        "±" not in without
        and "1.0000" in without
        and "nats per token" in without
        and format_results([]) == ""
    )


def test_it_says_how_to_use_the_model(page):
    commands, lines = Page(page).texts["code"]
    assert commands.splitlines() == [
        "dpo-wrapper chat out",
        "dpo-wrapper evaluate out --data OTHERS.jsonl",
        "dpo-wrapper train --model out --data MORE.jsonl --out NEXT",
    ]
    assert 'load_pretrained("out", None, 128)' in lines


def test_every_panel_is_a_figure_with_words(page):
    parsed = Page(page)
    labels = [value for name, value in parsed.attributes if name == "aria-label" and "Curve" in value]
    assert len(labels) == parsed.tags.count("svg") == 8
    assert labels[2].startswith("Curve over the steps of preference training: reward accuracy, fraction. ")
    assert "accuracy from 0.5 to " in labels[2] and "#010203" not in page


def test_settings_that_change_nothing_are_left_out(tmp_path):
    config = TrainConfig(data=tmp_path / "rows.jsonl", out=tmp_path, num_workers=2, save_steps=7)
    names = [*list_settings(config, has_loss=True)]
    assert names == ["data", "loss", "max length", "batch size", "seed"]
    settings = list_settings(replace(config, lora=True, lora_targets=("q", "v"), epochs=1), has_loss=False)
    assert "loss" not in settings
    assert settings | {"lora": "yes", "lora targets": "q, v", "epochs": "1"} == settings


def test_texts_of_models_stay_texts():
    sample = {"readable_prompt": SCRIPT, "reference": None, "policy": "", "chosen": f"{SCRIPT}\n\x1b[2J"}
    parsed = Page(format_sample(1, sample))
    assert parsed.texts["dd"] == [SCRIPT, "(empty)", f"{SCRIPT}\n\x1b[2J"]
    assert parsed.texts["dt"] == ["prompt", "policy", "chosen"] and "script" not in parsed.tags


def test_what_was_said_is_told():
    said = [{"stage": "dpo", "step": 4, "name": "loss rises", "text": "the loss <rises>: lower the rate."}]
    texts = Page(format_explanations(said)).texts
    assert texts["h3"] == ["dpo, step 4: loss rises"] and texts["p"] == ["The loss <rises>: lower the rate."]
    assert "no metric was out of the ordinary" in format_explanations([])


def test_a_page_that_is_missing_is_written_by_the_same_command(finished_run, rows, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(finished_run, folder)
    config = make_config(rows, folder, save_steps=0)
    with pytest.raises(ValueError, match="is finished: name a new folder"):
        train(config)
    (folder / "report.html").unlink()
    weights = (folder / "model.safetensors").read_bytes()
    log = (folder / "metrics.jsonl").read_bytes()
    train(config)
    assert "the model is trained, and the report is left" in capsys.readouterr().out
    assert Page((folder / "report.html").read_text(encoding="utf-8")).texts["h1"] == ["out"]
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert (folder / "model.safetensors").read_bytes() == weights
    assert (folder / "metrics.jsonl").read_bytes() == log


@pytest.mark.slow
@needs_browser
def test_page_in_a_browser(finished_run, tmp_path):
    check_page(finished_run / "report.html")
    pixels = take_picture(finished_run / "report.html", tmp_path / "dark.png", 390, 2000, is_dark=True)
    assert pixels.mean() < 0.3 and pixels.std() > 0.03  # something is drawn
