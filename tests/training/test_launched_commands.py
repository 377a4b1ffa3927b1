"""The commands of "Many processes" in docs/training.md, as they stand there, with fewer rows."""

import os
import re
import signal
import socket
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from helpers.forked_scripts import ROOT, ForkedCommand
from helpers.runs import BUNDLED, assert_metrics_close, read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="signals"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="each process would take a GPU"),
]

ADDED = ["--epochs", "1", "--samples", "0", "--exact-answers", "0"]


@pytest.fixture
def folder(tmp_path):
    """A working folder as a checkout is, with the first rows of the data."""
    (tmp_path / "examples" / "data").mkdir(parents=True)
    (tmp_path / "examples" / "accelerate").symlink_to(ROOT / "examples" / "accelerate")
    for file in BUNDLED.parent.glob("*.jsonl"):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)[:26]
        (tmp_path / "examples" / "data" / file.name).write_text("".join(lines), encoding="utf-8")
    return tmp_path


@pytest.fixture
def commands():
    """The commands of the section, each with its comment, if it has one."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    section = page.split("\n## Many processes\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
    return [line.split("  # ") for block in blocks for line in block.replace("\\\n", "").splitlines()]


def start(command, folder, name):
    """One of the commands, with options that leave little to do."""
    return ForkedCommand(folder / f"printed-{name}", folder, *command.split(), *ADDED)


def interrupt_after_step(command):
    """Ctrl-C once a step is done."""
    while not re.search(r"^(sft|dpo) +[1-9]\d*/", command.printed, re.MULTILINE):
        assert command.process.is_running(), command.printed
        time.sleep(0.02)
    os.killpg(command.process.pid, signal.SIGINT)


def find_free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def test_the_commands_of_the_page_train_the_same_model(commands, folder):
    (two, *_), (cluster, *_), *sharded = commands
    first = start(two, folder, "two")
    assert first.status == 0, first.printed
    assert first.printed.count("\ndpo 1/") == 1  # one run, and not one of each process

    assert "--machine_rank 0" in cluster and "--main_process_port 29501" in cluster
    cluster = cluster.replace("29501", str(find_free_port()))
    of_ranks = [cluster, cluster.replace("--machine_rank 0", "--machine_rank 1")]
    machines = [start(command, folder, f"machine-{rank}") for rank, command in enumerate(of_ranks)]
    assert [machine.status for machine in machines] == [0, 0], machines[0].printed + machines[1].printed
    assert "\ndpo 1/" in machines[0].printed and "\ndpo 1/" not in machines[1].printed

    runs = folder / "runs"
    for number, (command, *comment) in enumerate(sharded):
        running = start(command, folder, f"sharded-{number}")
        if is_interrupted := comment == ["Ctrl-C"]:
            interrupt_after_step(running)
        assert running.status == int(is_interrupted), running.printed
        assert ("\ncontinuing runs/sharded after step" in "\n" + running.printed) == (number > 0)
        assert ("the same command continues it in runs/sharded" in running.printed) == is_interrupted
        if is_interrupted:
            (checkpoint,) = (runs / "sharded" / "checkpoints").iterdir()
            size = len(list(checkpoint.glob("random-*.safetensors")))
            assert size == len(list(checkpoint.glob("shards/*.safetensors"))) == 2 + number
    assert number == 2 and not is_interrupted
    assert {path.name for path in runs.iterdir()} == {"two", "cluster", "sharded"}
    expected = load_file(runs / "two" / "model.safetensors")
    for name in ("cluster", "sharded"):
        assert_metrics_close(read_metrics(runs / "two"), read_metrics(runs / name))
        for key, value in load_file(runs / name / "model.safetensors").items():
            torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4)
