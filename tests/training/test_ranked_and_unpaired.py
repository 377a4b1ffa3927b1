"""The training command on ranked lists and on rows with a label."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from dpo_wrapper.cli import main
from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.training.train import train
from helpers.curves import rendered_curves
from helpers.datasets import write_rows
from helpers.marks import mark_slow_except
from helpers.runs import (
    BUNDLED,
    SMALL_DECODER,
    assert_metrics_close,
    interrupt_training,
    make_config,
    read_metrics,
    train_in_two_processes,
)

COUNT = 16


def bundled_rows():
    lines = BUNDLED.read_text(encoding="utf-8").splitlines()[:COUNT]
    return [{k: json.loads(line)[k] for k in ("prompt", "chosen", "rejected")} for line in lines]


def as_ranked(row, number):
    completions = [row["chosen"], row["rejected"]]
    return {
        "prompt": row["prompt"],
        "completions": [*completions, "No."][: 2 + number % 2],
        "weight": 1 + number % 3,
    }


def as_labelled(row, number):
    side = ("chosen", "rejected")[number % 2]
    return {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}


KTO = "kto(beta=0.3, undesirable=0.8)"
ROWS_OF_LOSSES = {"plackettluce(beta=0.3)": as_ranked, KTO: as_labelled}


@pytest.fixture(scope="module", params=mark_slow_except([KTO], ROWS_OF_LOSSES))
def finished(request, tmp_path_factory):
    """A loss, a file of what it learns from, and the folder of a finished run."""
    folder = tmp_path_factory.mktemp("listed")
    rows = [ROWS_OF_LOSSES[request.param](row, number) for number, row in enumerate(bundled_rows())]
    path = write_rows(folder / "rows.jsonl", rows)
    with rendered_curves(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", SMALL_DECODER)
        train(make_config(path, folder / "out", loss=request.param, save_steps=0))
    return request.param, path, folder / "out"


def assert_logs_close(expected_folder, actual_folder):
    assert_metrics_close(read_metrics(expected_folder), read_metrics(actual_folder))


def test_training_improves_the_metrics(finished):
    loss, _, out = finished
    unit = "lists" if loss.startswith("plackett") else "rows"
    log = [record for record in read_metrics(out) if record["stage"] == "dpo"]
    before, after = ([record for record in log if record["part"] == "train"][k] for k in (0, -1))
    assert before["rewards/accuracies"] == 0.5 and before["rewards/margins"] == 0.0
    assert after["rewards/margins"] > 0 and after["rewards/accuracies"] > 0.5
    steps = [record for record in log if record["part"] == "step"]
    eval_metrics = next(record for record in log if record["part"] == "eval")
    train_count = sum(record[f"{unit}/valid"] for record in steps) / 2
    assert train_count + eval_metrics[f"{unit}/valid"] == COUNT and before[f"{unit}/valid"] == train_count
    assert (out / "curves.png").stat().st_size > 20_000
    raw = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(
        f"{unit}/second" in record for record in raw if (record["stage"], record["part"]) == ("dpo", "step")
    )
    if unit == "rows":
        assert {r["rows/chosen"] + r["rows/rejected"] for r in steps} == {r["rows/valid"] for r in steps}
        assert any(record["kl"] != 0 for record in steps)


@pytest.mark.slow
@pytest.mark.pitfall(23)
@pytest.mark.parametrize("micro_batch_tokens", [1, 250])
def test_micro_batches_give_the_same_update(finished, tmp_path, micro_batch_tokens):
    loss, path, out = finished
    options = {"micro_batch_tokens": micro_batch_tokens, "num_workers": micro_batch_tokens % 2}
    train(make_config(path, tmp_path / "out", loss=loss, **options))
    expected, actual = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "out"))
    for name in expected:
        assert torch.allclose(expected[name], actual[name], atol=2e-5), name
    assert_logs_close(out, tmp_path / "out")


@pytest.mark.slow
def test_a_precomputed_reference_trains_alike(finished, tmp_path):
    loss, path, out = finished
    train(make_config(path, tmp_path / "out", loss=loss, precompute_ref_log_probs=True))
    assert_logs_close(out, tmp_path / "out")


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_same_result(finished, tmp_path):
    loss, path, out = finished
    with interrupt_training("dpo", after_steps=5):
        train(make_config(path, tmp_path / "out", loss=loss, save_steps=2))
    train(make_config(path, tmp_path / "out", loss=loss, save_steps=2, resume=True))
    assert read_metrics(tmp_path / "out") == read_metrics(out)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.pitfall(22)
def test_two_processes_report_what_one_does(finished, tmp_path):
    loss, path, out = finished
    train_in_two_processes(tmp_path / "script.py", path, tmp_path / "out", loss)
    assert_logs_close(out, tmp_path / "out")


# rows that are converted to what a loss needs


@pytest.mark.slow
def test_pairs_serve_every_loss(tmp_path, capsys):
    rows = bundled_rows()
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    lists = [{"prompt": r["prompt"], "completions": [r["chosen"], r["rejected"]]} for r in rows]
    single = [
        {"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"}
        for r in rows
        for side in ("chosen", "rejected")
    ]
    same = (
        ("kto", write_rows(tmp_path / "single.jsonl", single), pairs),
        ("plackettluce", write_rows(tmp_path / "lists.jsonl", lists), pairs),
        ("sigmoid", pairs, tmp_path / "lists.jsonl"),
    )
    for loss, *paths in same:
        logs = []
        for number, path in enumerate(paths):
            out = tmp_path / f"{loss}{number}"
            train(make_config(path, out, loss=loss, epochs=1, max_length=256))  # a pair is cut as one
            logs.append(read_metrics(out))
        assert logs[0] == logs[1]
    # of a list of two, the loss of a list is that of a pair
    compared = ("stage", "part", "step", "loss")
    assert_metrics_close(
        [{name: record[name] for name in compared} for record in logs[0]],
        [{name: record[name] for name in compared} for record in read_metrics(tmp_path / "plackettluce0")],
    )


@pytest.mark.slow
def test_lists_give_all_pairs_or_the_best_of_each(tmp_path, capsys):
    path = write_rows(
        tmp_path / "lists.jsonl", [{"prompt": f"{k}?", "completions": ["a", "b", "c", "d"]} for k in range(4)]
    )
    options = {"sft_epochs": 0, "eval_fraction": 0.25}
    for ranking, pairs in ((None, 6), ("all", 6), ("best", 3)):
        out = tmp_path / str(ranking)
        train(make_config(path, out, loss="sigmoid", ranking=ranking, epochs=1, **options))
        assert f"{3 * pairs} train and {pairs} eval pairs" in capsys.readouterr().out


def row(**columns):
    return {"prompt": "Q", **columns}


@pytest.mark.parametrize(
    "loss, rows, options, message",
    [
        (
            "sigmoid",
            [row(completion="a", label=True)],
            [],
            "rows.jsonl, line 1: a row should have two completions or more, but it has one with a label",
        ),
        (
            "plackettluce",
            [row(completion="a", label=True)],
            [],
            "line 1: a row should have two completions or more, but it has one",
        ),
        (
            "kto",
            [row(completions=["a", "b", "c"])],
            [],
            "line 1: a row should have one completion with a label, but it has a ranked list of 3: give",
        ),
        (
            "kto",
            [row(chosen="a", rejected="b", margin=1.0)],
            [],
            "line 1: the margin should be that of a pair, but it is 1.0",
        ),
        (
            "plackettluce",
            [row(completions=["a", "b"], margin=1)],
            [],
            "line 1: the margin should be that of a pair, but it is 1.0",
        ),
        ("kto", [row(completion="a", label=True)] * 3, [], "completions of other prompts, but all rows"),
        (
            "kto",
            [row(completion="a", label=False), {"prompt": "R", "completion": "b", "label": False}],
            ["--sft-epochs", "1"],
            "needs rows with a desirable completion, but there is none to train on: give --sft-epochs 0",
        ),
        (
            "kto",
            [row(chosen="a", rejected="b")],
            ["--ranking", "all"],
            "become pairs, but it is 'all' and the loss takes unpaired_preference data: leave the ranking",
        ),
        (
            "sigmoid",
            [row(chosen="a", rejected="b")],
            ["--ranking", "best"],
            "but it is 'best' and no row has more than two completions: leave the ranking out",
        ),
        ("kto", [row(chosen="a", rejected="b")], ["--ld-alpha", "0.5"], "--ld-alpha compares the two sides"),
        ("kto", [row(chosen="a", rejected="b")], ["--wpo"], "wpo weights pairs, and KTO learns from other"),
        ("kto + sft", [row(chosen="a", rejected="b")], [], "KTO and SFT learn from different data"),
        ("plackettluce", [row(completions=["a", "a"])], [], "--data should hold rows to train on, but"),
    ],
)
def test_rows_that_do_not_fit_get_one_sentence(tmp_path, capsys, loss, rows, options, message):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    command = ["train", "--data", str(path), "--out", str(tmp_path / "out"), "--loss", loss, "--cpu"]
    with pytest.raises(SystemExit) as caught:
        main([*command, "--eval-fraction", "0", *options])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dpo-wrapper: ")]
    assert caught.value.code == 2 and len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_undesirable_rows_are_left_out_of_supervised_training(tmp_path):
    rows = [
        {"prompt": f"{k}?", "completion": "yes" if k % 2 else "no", "label": k % 2 == 1} for k in range(8)
    ]
    path, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    train(make_config(path, out, loss="kto", eval_fraction=0.0, epochs=1))
    sft = [r for r in read_metrics(out) if r["stage"] == "sft" and r["part"] == "step"]
    assert len(sft) == 1, "4 of 8 rows, 4 a step"


def test_the_help_names_their_losses(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    named = (
        "of ranked lists: plackettluce(beta); of completions with a label: kto(beta, desirable, undesirable)"
    )
    assert named in printed
