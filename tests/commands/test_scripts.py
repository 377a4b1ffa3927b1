"""The shell scripts of examples/: which commands they run, with which options, and how they go on."""

import json
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import tyro

from dpo_wrapper.commands.chat.config import ChatConfig
from dpo_wrapper.commands.compare.config import parse_arguments as parse_comparison
from dpo_wrapper.commands.compare.runs import list_runs
from dpo_wrapper.commands.evaluate.config import EvaluateConfig
from dpo_wrapper.commands.export.config import ExportConfig, Format
from dpo_wrapper.commands.pairs.config import PairsConfig
from dpo_wrapper.training.command_line import parse_arguments
from helpers.examples import load_example
from helpers.recorded_commands import record_commands
from helpers.runs import BUNDLED


@pytest.fixture
def run_rounds(tmp_path):
    arguments = ("iterative_dpo.sh", "first", "logs.jsonl", "rules.py:score", "rounds")
    return partial(record_commands(tmp_path), *arguments)


def test_each_round_samples_from_the_model_of_the_last_and_trains_it(run_rounds):
    status, commands = run_rounds()
    assert status == 0 and [name for name, *_ in commands] == ["pairs", "train", "pairs", "train"]
    pairs = [tyro.cli(PairsConfig, args=args) for name, *args in commands if name == "pairs"]
    trains = [parse_arguments(args)[0] for name, *args in commands if name == "train"]
    assert [config.model for config in pairs] == [config.model for config in trains] == ["first", "rounds/1"]
    assert [config.seed for config in pairs] == [1, 2]
    assert [config.data for config in trains] == [(config.out,) for config in pairs]
    assert [config.out for config in trains] == [Path("rounds/1"), Path("rounds/2")]
    assert all(config.judge == "rules.py:score" and config.data == (Path("logs.jsonl"),) for config in pairs)


@pytest.mark.parametrize(
    ("fails", "num_done"), (("rounds/1.jsonl", 0), ("rounds/1", 1), ("rounds/2.jsonl", 2))
)
def test_it_goes_on_where_it_stopped(run_rounds, fails, num_done):
    status, before = run_rounds(fails=fails)
    assert status == 1 and len(before) == num_done + 1  # of which the last has failed
    _, whole = run_rounds()
    assert [name for name, *_ in whole] == ["pairs", "train", "pairs", "train"][num_done:]
    assert whole[0] == before[-1]


def test_one_script_leads_from_logs_to_an_answer(tmp_path):
    arguments = ("from_logs.sh", "model", "logs.jsonl", "out", "Why?")
    record = record_commands(tmp_path)
    run_script = partial(record, *arguments, "base.gguf")
    status, commands = run_script(fails="compare")
    assert status == 1 and [name for name, *_ in commands] == ["pairs", "compare"]
    status, after = run_script()
    assert status == 0
    assert [name for name, *_ in after] == ["compare", "evaluate", "chat", "export", "export", "export"]
    assert after[0] == commands[1]
    assert record(*arguments)[1] == after[:-1]  # no adapter over a base where none is named

    pairs = tyro.cli(PairsConfig, args=commands[0][1:])
    comparison = parse_comparison(after[0][1:])
    evaluation, chat = (
        tyro.cli(one, args=args, config=(tyro.conf.FlagCreatePairsOff,))
        for one, (_, *args) in zip((EvaluateConfig, ChatConfig), after[1:3], strict=True)
    )
    assert (pairs.data, pairs.model, pairs.out) == ((Path("logs.jsonl"),), "model", Path("out/pairs.jsonl"))
    assert {one.config.model for one in comparison.contestants} == {"model"}
    assert all(one.config.lora and one.config.data == (pairs.out,) for one in comparison.contestants)
    assert pairs.max_length == comparison.contestants[0].config.max_length
    assert evaluation.data == (pairs.out,)
    assert evaluation.model == chat.model == str(list_runs(comparison)[0].folder)
    assert chat.prompt == "Why?" and chat.reference

    options = (tyro.conf.FlagCreatePairsOff,)
    exports = [tyro.cli(ExportConfig, args=args, config=options) for _, *args in after[3:]]
    assert {one.model for one in exports} == {chat.model}
    assert {form for one in exports for form in one.to} == {*get_args(Format)} - {"x-transformers"}
    assert [one.quantize for one in exports] == ["none", "q8_0", "none"]
    assert [one.base for one in exports] == [None, None, Path("base.gguf")] and exports[2].adapter


def test_the_judge_of_the_bundled_tasks_tells_right_answers_from_wordy_and_wrong_ones():
    score = load_example("answer_key").score
    rows = [json.loads(line) for line in BUNDLED.read_text().splitlines()]
    assert all(
        score(row["prompt"], row["chosen"]) == 2 > score(row["prompt"], row["rejected"]) for row in rows
    )
    assert {score(row["prompt"], row["rejected"]) for row in rows} == {0, 1}
