"""The training command on ranked lists and on rows with a label, whatever a step is split into."""

import json
import re
import sys

import pytest
import torch
from safetensors.torch import load_file

from dpo_wrapper.cli import main
from dpo_wrapper.training.config import PRESETS
from dpo_wrapper.training.train import train
from dpo_wrapper.training.trainer import Loop
from helpers.runs import BUNDLED, Interrupted, config, records, train_twice

TINY = {"dim": 32, "depth": 1, "heads": 1}


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def bundled(count=26):
    lines = BUNDLED.read_text(encoding="utf-8").splitlines()[:count]
    return [{k: json.loads(line)[k] for k in ("prompt", "chosen", "rejected")} for line in lines]


def ranked(row, number):
    completions = [row["chosen"], row["rejected"]]
    return {
        "prompt": row["prompt"],
        "completions": [*completions, "No."][: 2 + number % 2],
        "weight": 1 + number % 3,
    }


def labelled(row, number):
    side = ("chosen", "rejected")[number % 2]
    return {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}


KINDS = {"plackettluce(beta=0.3)": ranked, "kto(beta=0.3, undesirable=0.8)": labelled}


@pytest.fixture(scope="module", params=KINDS)
def finished(request, tmp_path_factory):
    """A loss, a file of what it learns from, and a finished run."""
    folder = tmp_path_factory.mktemp("listed")
    rows = [KINDS[request.param](row, k) for k, row in enumerate(bundled())]
    path = written(folder / "rows.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        train(config(path, folder / "out", loss=request.param, save_every=0))
    return request.param, path, folder / "out"


def close(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        # until the first step is done policy and reference are equal up to rounding, which then decides
        early = {"rewards/accuracies"} if a["step"] < 2 else set()
        for name in a.keys() - {"tokens/padded", "tokens/unique", "stage", "part"} - early:
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-4), (a["part"], a["step"], name)


def test_it_trains_and_says_how_well(finished):
    loss, _, out = finished
    unit = "lists" if loss.startswith("plackett") else "rows"
    log = [r for r in records(out) if r["stage"] == "dpo"]
    before, after = ([r for r in log if r["part"] == "training"][k] for k in (0, -1))
    assert before["rewards/accuracies"] == 0.5 and before["rewards/margins"] == 0.0
    assert after["rewards/margins"] > 0 and after["rewards/accuracies"] > 0.5
    steps = [r for r in log if r["part"] == "step"]
    held_out = next(r for r in log if r["part"] == "held-out")
    trained = sum(r[f"{unit}/valid"] for r in steps) / 2
    assert trained + held_out[f"{unit}/valid"] == 26 and before[f"{unit}/valid"] == trained
    assert (out / "curves.png").stat().st_size > 20_000
    raw = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(f"{unit}/second" in r for r in raw if r["part"] == "step")
    if unit == "rows":
        assert {r["rows/chosen"] + r["rows/rejected"] for r in steps} == {r["rows/valid"] for r in steps}
        assert any(r["kl"] != 0 for r in steps)


@pytest.mark.parametrize("size", [1, 250])
def test_micro_batches_give_the_same_update(finished, tmp_path, size):
    loss, path, out = finished
    train(config(path, tmp_path / "out", loss=loss, max_tokens=size, workers=size % 2))
    expected, got = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "out"))
    for name in expected:
        assert torch.allclose(expected[name], got[name], atol=2e-5), name
    close(records(out), records(tmp_path / "out"))


def test_a_precomputed_reference_trains_alike(finished, tmp_path):
    loss, path, out = finished
    train(config(path, tmp_path / "out", loss=loss, precompute_reference=True))
    close(records(out), records(tmp_path / "out"))


def test_an_interrupted_run_resumes_to_the_same_result(finished, tmp_path, monkeypatch):
    loss, path, out = finished
    step = Loop.step

    def breaks(self, accelerator, current, *args):
        breaks.left -= current.name == "dpo"
        if breaks.left == 0:
            raise Interrupted
        return step(self, accelerator, current, *args)

    breaks.left = 6
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Loop, "step", breaks)
        train(config(path, tmp_path / "out", loss=loss, save_every=2))
    train(config(path, tmp_path / "out", loss=loss, save_every=2, resume=True))
    assert records(tmp_path / "out") == records(out)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_two_processes_report_what_one_does(finished, tmp_path):
    loss, path, out = finished
    train_twice(tmp_path / "script.py", path, tmp_path / "out", loss)
    close(records(out), records(tmp_path / "out"))


# one kind of rows for another


def test_pairs_serve_every_loss(tmp_path, capsys):
    rows = bundled()
    pairs = written(tmp_path / "pairs.jsonl", rows)
    lists = [{"prompt": r["prompt"], "completions": [r["chosen"], r["rejected"]]} for r in rows]
    single = [
        {"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"}
        for r in rows
        for side in ("chosen", "rejected")
    ]
    same = (
        ("kto", written(tmp_path / "single.jsonl", single), pairs),
        ("plackettluce", written(tmp_path / "lists.jsonl", lists), pairs),
        ("sigmoid", pairs, tmp_path / "lists.jsonl"),
    )
    for loss, *paths in same:
        logs = []
        for k, path in enumerate(paths):
            out = tmp_path / f"{loss}{k}"
            train(config(path, out, loss=loss, epochs=1))
            logs.append(records(out))
        assert logs[0] == logs[1]
    # of a list of two, the loss of a list is that of a pair
    close(
        [{"stage": r["stage"], "part": r["part"], "step": r["step"], "loss": r["loss"]} for r in logs[0]],
        [{k: r[k] for k in ("stage", "part", "step", "loss")} for r in records(tmp_path / "plackettluce0")],
    )


def test_lists_give_all_pairs_or_the_best_of_each(tmp_path, capsys):
    path = written(
        tmp_path / "lists.jsonl", [{"prompt": f"{k}?", "completions": ["a", "b", "c", "d"]} for k in range(4)]
    )
    for ranking, pairs in ((None, 6), ("all", 6), ("best", 3)):
        out = tmp_path / str(ranking)
        train(config(path, out, loss="sigmoid", ranking=ranking, sft_epochs=0, epochs=1, eval_fraction=0.25))
        assert f"{3 * pairs} training and {pairs} held-out pairs" in capsys.readouterr().out


def row(**columns):
    return {"prompt": "Q", **columns}


@pytest.mark.parametrize(
    "loss, rows, more, message",
    [
        (
            "sigmoid",
            [row(completion="a", label=True)],
            [],
            "rows.jsonl, line 1: a row should have two completions to compare, but it has one with a label",
        ),
        (
            "plackettluce",
            [row(completion="a", label=True)],
            [],
            "line 1: a row should have completions to rank, but it has one",
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
            "no row to train on is wanted, so there is nothing to warm up on: give --sft-epochs 0",
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
        ("kto", [row(chosen="a", rejected="b")], ["--ld-alpha", "0.5"], "ld_alpha compares the two sides"),
        ("kto", [row(chosen="a", rejected="b")], ["--wpo"], "wpo weights pairs, and KTO learns from other"),
        ("kto + sft", [row(chosen="a", rejected="b")], [], "KTO and SFT learn from different data"),
        ("plackettluce", [row(completions=["a", "a"])], [], "leaves no lists to train on"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, capsys, loss, rows, more, message):
    path = written(tmp_path / "rows.jsonl", rows)
    command = ["train", "--data", str(path), "--out", str(tmp_path / "out"), "--loss", loss, "--cpu"]
    with pytest.raises(SystemExit) as caught:
        main([*command, "--eval-fraction", "0", *more])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dpo-wrapper: ")]
    assert caught.value.code == 2 and len(said) == 1 and message in said[0]
    assert not (tmp_path / "out").exists()


def test_rows_that_are_not_wanted_are_not_written_in_the_warm_up(tmp_path):
    rows = [
        {"prompt": f"{k}?", "completion": "yes" if k % 2 else "no", "label": k % 2 == 1} for k in range(8)
    ]
    out = tmp_path / "out"
    train(config(written(tmp_path / "rows.jsonl", rows), out, loss="kto", eval_fraction=0.0, epochs=1))
    sft = [r for r in records(out) if r["stage"] == "sft" and r["part"] == "step"]
    assert len(sft) == 1, "4 of 8 rows, 4 a step"


def test_the_help_names_them():
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "dpo_wrapper", "train", "--help"], capture_output=True, text=True, check=True
    )
    shown = re.sub(r"[\s│]+", " ", done.stdout)
    assert "plackettluce(beta) (lists), kto(beta, desirable, undesirable) (rows)" in shown
