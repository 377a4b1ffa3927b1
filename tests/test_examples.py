"""The examples run, for a few steps, and learn; the bundled data are what the README says."""

import json
import runpy
import subprocess
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from dpo_wrapper.data import read_examples, split_examples
from helpers.examples import EXAMPLES, load_example
from helpers.runs import run_under_torchrun


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_help_starts_nothing(name, monkeypatch, capsys, tmp_path):
    pytest.importorskip("transformers")
    if name == "lightning":
        pytest.importorskip("pytorch_lightning")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert end.value.code == 0 and printed.startswith("usage:") and "loss" not in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_custom_loop():
    assert load_example("custom_loop").main(sft_steps=12, dpo_steps=6, batch_size=8) >= 0.75


@pytest.mark.slow
def test_hugging_face():
    pytest.importorskip("transformers")
    assert load_example("hugging_face").main(steps=8) >= 0.75


@pytest.mark.slow
def test_accelerate_loop_is_the_same_in_two_processes_and_in_other_micro_batches(tmp_path):
    pytest.importorskip("accelerate")
    script, options = EXAMPLES / "accelerate_loop.py", ["--epochs", "1", "--batch-size", "32"]
    history = load_example("accelerate_loop").main(
        out=tmp_path / "one", epochs=1, batch_size=32, micro_batch_size=12
    )
    printed = run_under_torchrun(script, *options, "--micro-batch-size", "5", "--out", tmp_path / "two")
    lines = [f"step {k + 1}: loss {step['loss']:.2f}" for k, step in enumerate(history)]
    assert [line[: len(lines[0])] for line in printed.splitlines()] == lines
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4, msg=name)
    assert history[-1]["rewards/accuracies"] >= 0.75


@pytest.mark.slow
def test_accelerate_loop_in_bfloat16():
    main = load_example("accelerate_loop").main
    assert main(epochs=1, batch_size=64, precision="bf16")[-1]["loss"] < 6.5


@pytest.mark.slow
def test_lightning(tmp_path):
    pytest.importorskip("pytorch_lightning")
    command = [sys.executable, EXAMPLES / "lightning.py", "--epochs", "1", "--out", tmp_path]
    subprocess.run(list(map(str, command)), check=True)  # its own name hides no library
    assert load_file(tmp_path / "model" / "model.safetensors")
    trainer = load_example("lightning").main(out=tmp_path, epochs=2, resume=True)
    assert trainer.current_epoch == 2 and trainer.global_step == 2 * trainer.num_training_batches
    assert trainer.callback_metrics["eval/rewards/accuracies"] >= 0.75


def test_bundled_data():
    path = EXAMPLES / "data" / "preferences.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(records) == 256
    families = Counter(record["family"] for record in records)
    assert len(families) == 8 and set(families.values()) == {32}
    read = read_examples(path)
    rows = read.examples
    training, held_out = split_examples(rows, 0.1, 0)
    assert (len(training), len(held_out)) == (216, 40)
    assert not {row.prompt.lower() for row in training} & {row.prompt.lower() for row in held_out}
    assert sum(
        len(chosen) < len(rejected) for chosen, rejected in (row.completions for row in rows)
    ) >= 0.9 * len(rows)


def test_the_arithmetic_in_the_bundled_data_is_right():
    path = EXAMPLES / "data" / "preferences.jsonl"
    checked = 0
    for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        words = record["prompt"].rstrip("?.").split()
        for sign in "+-*/":
            if record["family"] == "arithmetic" and sign in words:
                at = words.index(sign)
                a, b = float(words[at - 1]), float(words[at + 1])
                value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
                assert float(record["chosen"].rstrip(".")) == value, record
                checked += 1
    assert checked >= 5
