"""The examples run, for a few steps, and learn; the bundled data are what the README says."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

from dpo_wrapper.data import read_examples, split_examples

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
