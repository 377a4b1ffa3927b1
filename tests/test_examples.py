"""The examples run, for a few steps, and learn; the bundled data are what the README says."""

import json
import runpy
import subprocess
import sys
from collections import Counter

import pytest
import torch

from dpo_wrapper.data import read_examples, split_examples
from dpo_wrapper.pretrained import PRESETS, load_pretrained
from helpers.examples import EXAMPLES, load_example
from helpers.marks import mark_slow_except
from helpers.runs import SMALL_DECODER, run_under_torchrun

NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", mark_slow_except({"custom_loop"}, NAMES))
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


@pytest.fixture
def small_decoder(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SMALL_DECODER)


@pytest.mark.slow
def test_accelerate_loop_is_the_same_in_two_processes_and_in_other_micro_batches(tmp_path, small_decoder):
    pytest.importorskip("accelerate")
    out, script, options = tmp_path / "out", tmp_path / "script.py", {"batch_size": 32, "steps": 4}
    script.write_text(
        "from pathlib import Path\n"
        "import torch\n"
        "from dpo_wrapper.pretrained import PRESETS\n"
        "from helpers.examples import load_example\n"
        "from helpers.runs import SMALL_DECODER\n"
        "torch.set_num_threads(1)\n"
        "PRESETS['tiny'] = SMALL_DECODER\n"
        f"load_example('accelerate_loop').main(out=Path({str(out)!r}), micro_batch_size=5, **{options!r})\n"
    )
    history = load_example("accelerate_loop").main(out=tmp_path, micro_batch_size=12, **options)
    printed = run_under_torchrun(script).splitlines()
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in printed]
    assert losses == pytest.approx([step["loss"] for step in history], abs=2e-3)
    one, two = (load_pretrained(str(folder), None, 256).model.state_dict() for folder in (tmp_path, out))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4, msg=name)
    assert history[-1]["rewards/accuracies"] > 0.6 and losses[-1] < losses[0]


def test_accelerate_loop_in_bfloat16(small_decoder):
    state = pytest.importorskip("accelerate.state").AcceleratorState
    main, losses = load_example("accelerate_loop").main, {}
    try:
        for precision in ("no", "bf16"):
            state._reset_state()  # a process has one precision
            history = main(steps=2, batch_size=8, precision=precision)
            losses[precision] = [step["loss"] for step in history]
    finally:
        state._reset_state()
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.01) and losses["bf16"] != losses["no"]


@pytest.mark.slow
def test_lightning(tmp_path, small_decoder):
    pytest.importorskip("pytorch_lightning")
    main = load_example("lightning").main
    main(out=tmp_path, epochs=1)
    trainer = main(out=tmp_path, epochs=2, resume=True)
    assert trainer.current_epoch == 2 and trainer.global_step == 2 * trainer.num_training_batches
    assert trainer.callback_metrics["eval/rewards/accuracies"] >= 0.75
    assert load_pretrained(str(tmp_path / "model"), None, 256).decoder_args is not None


@pytest.mark.slow
def test_the_name_of_the_example_with_lightning_hides_no_library():
    pytest.importorskip("pytorch_lightning")
    subprocess.run([sys.executable, str(EXAMPLES / "lightning.py"), "--help"], check=True)


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
