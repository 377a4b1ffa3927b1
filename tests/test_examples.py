"""The examples run, for a few steps, and learn; the bundled data are what the README says."""

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from dpo_wrapper.data import read_examples, split_examples
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.train import train
from helpers.runs import read_metrics

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_custom_loop():
    assert load("custom_loop").main(sft_steps=12, dpo_steps=6, batch_size=8) >= 0.75


@pytest.mark.slow
def test_hugging_face():
    pytest.importorskip("transformers")
    assert load("hugging_face").main(steps=8) >= 0.75


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
    load("data/make_data").main(["--out", str(tmp_path)])
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
    """The first command of the README."""
    train(TrainConfig(data=EXAMPLES / "data", out=tmp_path / "run", cpu=True, save_steps=0))
    rates = [
        record["exact_answers"] for record in read_metrics(tmp_path / "run") if "exact_answers" in record
    ]
    assert rates[0] < 0.5 and rates[1] >= 0.6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data/make_data"])
def test_help(name):
    command = [sys.executable, EXAMPLES / f"{name}.py", "--help"]
    assert "usage:" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
