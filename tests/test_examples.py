"""The examples run, for a few steps, and learn; the bundled data are what the README says."""

import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from dpo_wrapper.data import read_examples, split_examples
from dpo_wrapper.evaluation import reward
from dpo_wrapper.pretrained import PRESETS, load_pretrained
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.setup import set_up_training
from dpo_wrapper.training.train import train
from helpers.curves import rendered_curves
from helpers.examples import EXAMPLES, load_example
from helpers.marks import mark_slow_except
from helpers.runs import QUICK, SMALL_DECODER, read_metrics, run_in_two_processes

NAMES = sorted(
    path.relative_to(EXAMPLES).with_suffix("").as_posix()
    for path in EXAMPLES.rglob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)


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
    assert load_example("custom_loop").main(sft_steps=20, dpo_steps=15) >= 0.75


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
        "from accelerate import Accelerator\n"
        "from dpo_wrapper.pretrained import PRESETS\n"
        "from helpers.examples import load_example\n"
        "from helpers.runs import SMALL_DECODER\n"
        "torch.set_num_threads(1)\n"
        "PRESETS['tiny'] = SMALL_DECODER\n"
        "Accelerator.end_training = lambda _: None  # the group stays for the count of its processes\n"
        f"load_example('accelerate_loop').main(out=Path({str(out)!r}), micro_batch_size=5, **{options!r})\n"
    )
    history = load_example("accelerate_loop").main(out=tmp_path, micro_batch_size=12, **options)
    printed = run_in_two_processes(script).splitlines()
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


@pytest.mark.slow
def test_best_of_n_ranks_answers_by_their_rewards(tmp_path, small_decoder, rows, capsys):
    options = QUICK | {"max_steps": 2, "max_length": 96, "sft_epochs": 1, "cpu": True}
    train(TrainConfig(data=rows, out=tmp_path / "run", **options))
    run, prompt = str(tmp_path / "run"), "Repeat wolf leaf."
    answers = load_example("best_of_n").main(run, prompt, n=4, max_new_tokens=5)
    lines = capsys.readouterr().out.splitlines()[-len(answers) :]
    rewards = [float(line.split()[0]) for line in lines]
    assert len(answers) > 1 and rewards == sorted(rewards, reverse=True)
    expected = reward(run, None, prompt, answers)
    assert rewards == pytest.approx(expected, abs=1e-3)


def read_bundled(name):
    text = (EXAMPLES / "data" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_bundled_data():
    demonstrations, preferences = read_bundled("demonstrations"), read_bundled("preferences")
    assert (len(demonstrations), len(preferences)) == (3000, 600)
    for records in (demonstrations, preferences):
        for split in ("train", "test"):
            families = Counter(record["family"] for record in records if record["split"] == split)
            assert len(families) == 10 and len(set(families.values())) == 1
    prompts = [record["prompt"] for record in (*demonstrations, *preferences)]
    assert len(set(prompts)) == len(prompts)  # so that what is asked for evaluation is new
    training, held_out = split_examples(read_examples(EXAMPLES / "data" / "preferences.jsonl").examples, 0.1)
    assert (len(training), len(held_out)) == (500, 100)


def test_the_bundled_data_is_what_its_script_writes(tmp_path):
    load_example("data/make_data").main(["--out", str(tmp_path)])
    for name in ("demonstrations.jsonl", "preferences.jsonl"):
        assert (tmp_path / name).read_bytes() == (EXAMPLES / "data" / name).read_bytes()


ANSWERS = {
    r"Repeat (....) (....)\.": "{0} {1}",
    r"What is first in (....), (....), (....)\?": "{0}",
    r"What is second in (....), (....), (....)\?": "{1}",
    r"What is last in (....), (....), (....)\?": "{2}",
    r"Put (....) (....) in quotes\.": '"{0} {1}"',
    r"Put (....) (....) in brackets\.": "({0} {1})",
    r"Put (....) (....) in stars\.": "*{0} {1}*",
    r"Join (....) and (....) by a dash\.": "{0}-{1}",
    r"Join (....) and (....) by a plus\.": "{0}+{1}",
    r"Join (....) and (....) by a slash\.": "{0}/{1}",
    r"Swap (....) and (....)\.": "{1} and {0}",
    r"Reverse (....), (....), (....)\.": "{2}, {1}, {0}",
    r"The (....) is near the (....)\. What\?": "{0}",
    r"The (....) is near the (....)\. Near what\?": "{1}",
}


def answer(prompt):
    """What a prompt of the bundled data asks for."""
    if capitals := re.fullmatch(r"Write (.... ....) in capitals\.", prompt):
        return capitals[1].upper()
    [(found, form)] = [(found, form) for p, form in ANSWERS.items() if (found := re.fullmatch(p, prompt))]
    return form.format(*found.groups())


def test_answers_in_the_bundled_data_are_right():
    for record in read_bundled("preferences"):
        assert record["chosen"] == answer(record["prompt"]) != record["rejected"]
    plain = [answer(record["prompt"]) == record["completion"] for record in read_bundled("demonstrations")]
    assert 0.3 < sum(plain) / len(plain) < 0.5
    assert all(answer(record["prompt"]) in record["completion"] for record in read_bundled("demonstrations"))


@pytest.mark.slow
def test_a_run_on_the_bundled_data_learns_to_answer_exactly(tmp_path):
    """The first command of the README, evaluated less, with two of its five epochs of supervised training."""
    config = TrainConfig(data=EXAMPLES / "data", out=tmp_path / "run", cpu=True, save_steps=0)
    assert [stage.epochs for stage in set_up_training(config).stages] == [5, 3]
    with rendered_curves():
        train(replace(config, sft_epochs=2, eval_steps=1000))
    rates = [
        record["exact_answers"] for record in read_metrics(tmp_path / "run") if "exact_answers" in record
    ]
    assert rates[0] < 0.4 and rates[1] >= 0.5  # after all epochs 0.37 and 1.0
