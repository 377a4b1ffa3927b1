"""The command line as a user meets it: help, one sentence for what is wrong, exit status, no traceback."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_wrapper import cli
from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.training.config import GROUPS, TrainConfig
from dpo_wrapper.version import __version__
from helpers.forked_scripts import ForkedCommand
from helpers.runs import BUNDLED, ROOT, SMALL_DECODER


def run_command(*args, status):
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(arg) for arg in args])
    assert exit_.value.code == status


def remove_frame(text):
    """The text of the messages that tyro draws a frame around."""
    return re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]", " ", text))


def test_help_lists_every_option_with_its_text(capsys):
    run_command("train", "--help", status=0)
    printed = remove_frame(capsys.readouterr().out)
    for name in TrainConfig.__dataclass_fields__:
        option = f"--{name.replace('_', '-')}"
        assert re.search(rf"{option} .{{0,60}}[A-Z0-9a-z].{{15,}}", printed), option


@pytest.mark.slow
def test_help_loads_nothing_heavy_but_torch():
    code = (
        "import sys\n"
        "from dpo_wrapper.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = ('transformers', 'accelerate', 'datasets', 'matplotlib', 'triton', 'pyarrow',\n"
        "    'x_transformers', 'peft')\n"
        "print('LOADED', [m for m in heavy if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip().endswith("LOADED []"), done.stdout[-300:] + done.stderr[-300:]


def json_line(**fields):
    return json.dumps(fields) + "\n"


GOOD = json_line(prompt="p", chosen="a", rejected="b") + json_line(prompt="q", chosen="a", rejected="b")

BAD = {
    "no such file": ({}, ["--data", "missing.jsonl"], r"missing\.jsonl.*(no such|not|does not)"),
    "unknown ending": ({"d.txt": GOOD}, ["--data", "d.txt"], r"d\.txt.*\.jsonl"),
    "empty file": ({"d.jsonl": ""}, ["--data", "d.jsonl"], r"d\.jsonl.*empty"),
    "bad json": ({"d.jsonl": GOOD + "{oops\n"}, ["--data", "d.jsonl"], r"d\.jsonl, line 3"),
    "missing field": (
        {"d.jsonl": GOOD + json_line(prompt="p", chosen="a")},
        ["--data", "d.jsonl"],
        r"d\.jsonl, line 3, field 'rejected'",
    ),
    "wrong type": (
        {"d.jsonl": json_line(prompt="p", chosen=3, rejected="b")},
        ["--data", "d.jsonl"],
        r"d\.jsonl, line 1, field 'chosen'.*number 3",
    ),
    "field that is not there": (
        {"d.jsonl": GOOD},
        ["--data", "d.jsonl", "--columns", "prompt=question"],
        r"line 1, field 'question'",
    ),
    "nothing preferred": (
        {"d.jsonl": json_line(prompt="p", chosen="a", rejected="a")},
        ["--data", "d.jsonl", "--eval-fraction", "0"],
        r"to train on, but d\.jsonl leaves none .Left out of 1 example: 1 with the same tokens",
    ),
    "gzip cut off": ({"d.jsonl.gz": b"\x1f\x8b\x08\x00"}, ["--data", "d.jsonl.gz"], r"d\.jsonl\.gz"),
    "not parquet": ({"d.parquet": "hello"}, ["--data", "d.parquet"], r"d\.parquet"),
    "eval file missing": (
        {"d.jsonl": GOOD},
        ["--data", "d.jsonl", "--eval-data", "no.jsonl"],
        r"no\.jsonl",
    ),
    "eval file is the train file": (
        {"d.jsonl": GOOD},
        ["--data", "d.jsonl", "--eval-data", "d.jsonl"],
        "same file",
    ),
    "unknown option": ({"d.jsonl": GOOD}, ["--data", "d.jsonl", "--epochz", "1"], "--epochz.*--epochs"),
    "not a number": ({"d.jsonl": GOOD}, ["--data", "d.jsonl", "--epochs", "many"], "--epochs.*many"),
    "no data": ({}, [], "--data"),
    "negative epochs": (
        {"d.jsonl": GOOD},
        ["--data", "d.jsonl", "--epochs", "-1"],
        "--epochs should be 0 or more",
    ),
    "batch of none": (
        {"d.jsonl": GOOD},
        ["--data", "d.jsonl", "--batch-size", "0"],
        "--batch-size should be at least 1",
    ),
    "learning rate": (
        {"d.jsonl": GOOD},
        ["--data", "d.jsonl", "--learning-rate", "0"],
        "--learning-rate should be a positive number",
    ),
    "learning rate nan": (
        {"d.jsonl": GOOD},
        ["--data", "d.jsonl", "--lr", "nan"],
        "--learning-rate should be a positive number",
    ),
    "fraction": (
        {"d.jsonl": GOOD},
        ["--data", "d.jsonl", "--eval-fraction", "1"],
        r"--eval-fraction should be in \[0, 1\)",
    ),
    "too short": (
        {"d.jsonl": GOOD},
        ["--data", "d.jsonl", "--max-length", "4"],
        "--max-length should be an integer of at least 8",
    ),
    "precision": ({"d.jsonl": GOOD}, ["--data", "d.jsonl", "--precision", "int8"], "--precision.*bf16"),
    "unknown loss": (
        {"d.jsonl": GOOD},
        ["--data", "d.jsonl", "--loss", "ppo"],
        "the loss in 'ppo' should be one of sigmoid",
    ),
    "loss option": (
        {"d.jsonl": GOOD},
        ["--data", "d.jsonl", "--loss", "sft(beta=1)"],
        r"the options of sft should be left out, but the loss is 'sft\(beta=1\)'",
    ),
    "beta": (
        {"d.jsonl": GOOD},
        ["--data", "d.jsonl", "--loss", "sigmoid(beta=-1)"],
        "beta should be .*positive.*-1",
    ),
    "wpo of a sorted loss": (
        {"d.jsonl": GOOD},
        ["--data", "d.jsonl", "--loss", "aot", "--wpo"],
        "weights of pairs have no meaning for AOT",
    ),
    "folder without a model": (
        {"d.jsonl": GOOD, "m/x": ""},
        ["--data", "d.jsonl", "--model", "m"],
        "m holds no config.json",
    ),
    "folder with a foreign config": (
        {"d.jsonl": GOOD, "m/config.json": "{}"},
        ["--data", "d.jsonl", "--model", "m"],
        r"--model should be a causal LM that transformers can load, but m could not be loaded \(.*\): check",
    ),
    "tokenizer of another model": (
        {"d.jsonl": GOOD},
        ["--data", "d.jsonl", "--tokenizer", "folder/that/is/not/there"],
        "folder/that/is/not/there",
    ),
    "out is a file": (
        {"d.jsonl": GOOD, "o": ""},
        ["--data", "d.jsonl", "--out", "o"],
        "--out should be a folder, but o is a file",
    ),
    "out is below a file": (
        {"o": ""},
        ["--data", "missing.jsonl", "--out", "o/x/y"],
        r"--out should be a folder, but .*/o is a file: name a new folder",
    ),
    "out cannot be written": (
        {},
        ["--data", "missing.jsonl", "--out", "/proc/o"],
        r"--out should be a folder that can be written, but /proc/o cannot \(.*\): name another",
    ),
    "out is not empty": (
        {"d.jsonl": GOOD, "o/x": ""},
        ["--data", "d.jsonl", "--out", "o"],
        "or that of an unfinished run, but o is not empty: name a new",
    ),
    "nothing to resume": ({"d.jsonl": GOOD}, ["--data", "d.jsonl", "--out", "o", "--resume"], "holds no run"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_loses_nothing(case, tmp_path, monkeypatch, capsys):
    files, args, sentence = BAD[case]
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(PRESETS, "tiny", SMALL_DECODER)
    before = sorted(path for path in tmp_path.rglob("*"))
    run_command("train", *args, status=2)
    err = remove_frame(capsys.readouterr().err)
    assert re.search(sentence, err), err
    assert "Traceback" not in err
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])  # to workers as well
def test_a_signal_writes_a_checkpoint_and_says_how_to_continue(tmp_path, number):
    out = tmp_path / "out"
    words = ["dpo-wrapper", "train", "--data", BUNDLED, "--out", out, "--cpu", "--num-workers", "1"]
    command = ForkedCommand(tmp_path / "printed", ROOT, *words)
    log = out / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and log.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(command.process.pid, number)
    assert command.status == 128 + number
    assert list(out.glob("checkpoints/*/progress.json"))
    assert "the same command continues it" in command.errors and "Traceback" not in command.errors


@pytest.mark.slow
def test_the_program_is_installed_under_both_names():
    for command in ([sys.executable, "-m", "dpo_wrapper"], ["dpo-wrapper"]):
        if command[0] == "dpo-wrapper":
            beside = Path(sys.executable).parent / "dpo-wrapper"
            if not beside.exists():
                pytest.skip("the package is not installed here")
            command = [str(beside)]
        done = subprocess.run(
            [*command, "--help"], capture_output=True, text=True, cwd=ROOT, env={**os.environ}
        )
        assert done.returncode == 0 and "train" in done.stdout


def test_ctrl_c_while_libraries_load_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run(
        [sys.executable, "-m", "dpo_wrapper", "train", "--data", "x"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    )
    assert done.returncode == 130
    assert done.stderr == "dpo-wrapper: interrupted before anything was done.\n"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [(["trian"], "it is trian: did you mean train?"), (["fly"], "it is fly: see dpo-wrapper --help.")],
)
def test_an_unknown_command_is_refused(args, sentence, capsys):
    run_command(*args, status=2)
    assert sentence in capsys.readouterr().err


def test_the_version_and_the_commands_are_printed(capsys):
    run_command("--version", status=0)
    assert capsys.readouterr().out == f"dpo-wrapper {__version__}\n"
    run_command("--help", status=0)
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in cli.COMMANDS)


def test_help_names_its_command_and_groups_options(capsys):
    run_command("train", "--epochz", "3", "--data", "x", status=2)
    assert "dpo-wrapper train --help" in capsys.readouterr().err
    run_command("train", "--help", status=0)
    printed = capsys.readouterr().out
    assert all(f" {group} options " in printed for group in GROUPS)
