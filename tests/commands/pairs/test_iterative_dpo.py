"""The recipe of iterative DPO: which commands it runs, with which options, and how it goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from dpo_wrapper.commands.pairs.config import PairsConfig
from dpo_wrapper.training.command_line import parse_arguments
from helpers.examples import EXAMPLES, load_example
from helpers.runs import BUNDLED

COMMAND = """#!{python}
import json, os, sys
from pathlib import Path

with open("commands", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
out = Path(sys.argv[sys.argv.index("--out") + 1])
if os.environ.get("FAILS") == str(out):
    sys.exit(1)
if sys.argv[1] == "pairs":
    out.write_text("")
else:
    out.mkdir()
    (out / "run.json").write_text('{{"status": "finished"}}')
"""


@pytest.fixture
def run_script(tmp_path):
    """Run the script with a command in place of `dpo-wrapper` that writes down what it should do."""
    command = tmp_path / "bin" / "dpo-wrapper"
    command.parent.mkdir()
    command.write_text(COMMAND.format(python=sys.executable))
    command.chmod(0o755)

    def run_script(fails=""):
        script = [str(EXAMPLES / "iterative_dpo.sh"), "first", "logs.jsonl", "rules.py:score", "rounds"]
        path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(["sh", *script], cwd=tmp_path, env=os.environ | {"PATH": path, "FAILS": fails})
        lines = (tmp_path / "commands").read_text().splitlines()
        (tmp_path / "commands").unlink()
        return done.returncode, [json.loads(line) for line in lines]

    return run_script


def test_each_round_samples_from_the_model_of_the_last_and_trains_it(run_script):
    status, commands = run_script()
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
def test_it_goes_on_where_it_stopped(run_script, fails, num_done):
    status, before = run_script(fails)
    assert status == 1 and len(before) == num_done + 1  # of which the last has failed
    _, whole = run_script()
    assert [name for name, *_ in whole] == ["pairs", "train", "pairs", "train"][num_done:]
    assert whole[0] == before[-1]


def test_the_judge_of_the_bundled_tasks_tells_right_answers_from_wordy_and_wrong_ones():
    score = load_example("answer_key").score
    rows = [json.loads(line) for line in BUNDLED.read_text().splitlines()]
    assert all(
        score(row["prompt"], row["chosen"]) == 2 > score(row["prompt"], row["rejected"]) for row in rows
    )
    assert {score(row["prompt"], row["rejected"]) for row in rows} == {0, 1}
