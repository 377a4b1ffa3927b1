"""`forked_launch.py FOLDER STATUS COMMAND ...`: runs a command in a folder, one of `torchrun` for example.

The processes that these start are forked from this one, which has imported the libraries. It leads a group of
processes, as a command in a terminal does, and writes its exit status to a file.
"""

import os
import runpy
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.distributed import run

from helpers.curves import unrendered_curves

config_from_args = run.config_from_args


def run_python(*words: str) -> int:
    """What `python` does with a module after `-m` or with the path of a script; returns the exit status."""
    sys.argv = [*words[words[0] == "-m" :]]
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


def run_command(name: str, *words: str) -> int:
    """The command's exit status."""
    if name == "dpo-wrapper":
        return run_python("-m", "dpo_wrapper", *words)
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
