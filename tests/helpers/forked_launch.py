"""`forked_launch.py FOLDER STATUS COMMAND ...`: runs a command in a folder, one of `torchrun` for example.

The command may also be the path of a script of benchmarks. The processes that `torchrun`, `accelerate` and
benchmarks start are forked from this one, which has imported the libraries. It leads a group of
processes, as a command in a terminal does, and writes its exit status to a file.
"""

import os
import runpy
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.distributed import run

from helpers.curves import unrendered_curves
from helpers.forking_server import end_with

config_from_args = run.config_from_args


def run_python(*words: str) -> int:
    """What `python` does with a module after `-m` or with the path of a script; returns the exit status."""
    sys.argv = [*words[words[0] == "-m" :]]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    try:
        with unrendered_curves():
            if words[0] == "-m":
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def run_worker(_unbuffered: str, *words: str) -> None:
    """Run Python in a session of its own, as those of torch, and without the handlers of what launched it."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if status := run_python(*words):
        sys.exit(status)  # who ends well has to return


def fork_workers(args: Any) -> tuple[Any, Any, list[str]]:
    config, _interpreter, words = config_from_args(args)
    return replace(config, start_method="fork"), run_worker, words


class Contestant:
    """Of a benchmark: a script in a process that is forked, with pipes for its input and output."""

    def __init__(self, command: list[str], env: dict[str, str], stderr: Any) -> None:
        (child_in, parent_in), (parent_out, child_out) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            for number, file in enumerate((child_in, child_out, stderr.fileno())):
                os.dup2(file, number)
            os.environ.update(env)
            sys.stdin = os.fdopen(0)  # what the server has read ahead is not meant for it
            end_with(lambda: sys.exit(run_python(*command)))
        os.close(child_in)
        os.close(child_out)
        self.stdin, self.stdout = os.fdopen(parent_in, "w"), os.fdopen(parent_out)
        self.status: int | None = None

    def wait(self) -> int:
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def __enter__(self) -> "Contestant":
        return self

    def __exit__(self, *_: object) -> None:
        self.stdin.close()
        self.stdout.close()
        self.wait()


def start_process(command: Any, popen: Any = subprocess.Popen, **options: Any) -> Any:
    """In place of `subprocess.Popen`, by which benchmarks start contestants and other processes."""
    if command[0] == sys.executable and options.get("stdin") == subprocess.PIPE:
        return Contestant(command[1:], options["env"], options["stderr"])
    return popen(command, **options)


def run_command(name: str, *words: str) -> int:
    """The command's exit status."""
    if name == "dpo-wrapper":
        return run_python("-m", "dpo_wrapper", *words)
    if name.endswith(".py"):
        with patch.object(subprocess, "Popen", start_process):
            return run_python(name, *words)
    sys.argv = [name, *words]
    with patch.object(run, "config_from_args", fork_workers):
        if name == "torchrun":
            run.main()
        else:
            from accelerate.commands.accelerate_cli import main

            main()
    return 0


if __name__ == "__main__":
    folder, file, *command = sys.argv[1:]
    os.setpgrp()
    os.chdir(folder)
    status = 1
    try:
        status = run_command(*command)
    finally:
        Path(file).write_text(str(status))
