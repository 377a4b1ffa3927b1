"""Scripts in processes of their own, one or several that belong together, started by a server that forks."""

import atexit
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "tests" / "helpers" / "forked_launch.py"
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
TIMEOUT = 300
TIME_OF_DUMP = TIMEOUT - 20
"""When each process prints where it stands; both in seconds."""


def call_in_fork(function: Callable[[], object], printed: Path) -> int:
    """Call a function in a process that is forked from this one; returns its exit status.

    What it prints to standard output and standard error is written to `printed`.
    """
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status: Any = 99
    try:
        sys.stdout = sys.stderr = printed.open("w", buffering=1)
        function()
        status = 0
    except SystemExit as exit_:
        status = exit_.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # no handler of the tests is called


@cache
def start_server() -> "subprocess.Popen[str]":
    """The server of this test session, which ends with it."""
    server = subprocess.Popen(
        [sys.executable, "-m", "helpers.forking_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": PATHS},
    )
    atexit.register(server.communicate)
    return server


class ForkedScript:
    """A script that runs, in so many processes that belong together; 0 is one by itself.

    Args:
        folder: for what it prints and what is known of it, a new one.

    Attributes:
        process: the one that waits for the others, or the script's own if it runs by itself.
    """

    def __init__(self, size: int, folder: Path, script: Path, *arguments: Any) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("the processes are forked")
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        self.size, self.folder = size, folder
        words = [str(script), *map(str, arguments)]
        asked = {"folder": str(folder), "size": size, "script": words, "environ": dict(os.environ)}
        server = start_server()
        assert server.stdin is not None and server.stdout is not None
        print(json.dumps(asked), file=server.stdin, flush=True)
        self.process = psutil.Process(int(server.stdout.readline()))

    @cached_property
    def ranks(self) -> list[psutil.Process]:
        """The processes that belong together."""
        deadline = time.monotonic() + TIMEOUT
        while not (file := self.folder / "pids.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return [psutil.Process(pid) for pid in json.loads(file.read_text())]

    def wait(self) -> list[int]:
        """The status of each of the processes that belong together, once all have ended."""
        try:
            self.process.wait(TIMEOUT)
        except psutil.TimeoutExpired:
            pytest.fail(f"no end after {TIMEOUT} s; where the processes stood:\n{self.errors[-10_000:]}")
        finally:
            if self.process.is_running():
                psutil.wait_procs([one.kill() or one for one in (self.process, *self.process.children())])
        return json.loads((self.folder / "codes.json").read_text()) if self.size else []

    @property
    def errors(self) -> str:
        return (self.folder / "stderr").read_text(encoding="utf-8")

    @property
    def output(self) -> str:
        return (self.folder / "stdout").read_text(encoding="utf-8")

    @property
    def sentences(self) -> list[str]:
        """What the command said of its end."""
        return [line for line in self.errors.splitlines() if line.startswith("dpo-wrapper: ")]


class ForkedCommand(ForkedScript):
    """A command in a process that leads a group: ours, or one of `torchrun` or `accelerate`.

    Args:
        printed: for what it prints, a new folder.
        folder: where it runs.
    """

    def __init__(self, printed: Path, folder: Path, *words: Any) -> None:
        super().__init__(0, printed, LAUNCH, folder, printed / "status", *words)

    @property
    def status(self) -> int:
        """Its exit status, once it has ended."""
        self.wait()
        return int((self.folder / "status").read_text())

    @property
    def printed(self) -> str:
        return self.output + self.errors
