"""Runs in processes of their own, forked from one that has imported what they need, which takes longer."""

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from helpers.runs import ROOT

FORKING = """
import os, signal, sys
from pathlib import Path
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever ends is gone at once
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        break
    print(pid, flush=True)
else:
    sys.exit()
for number in (signal.SIGCHLD, signal.SIGINT):
    signal.signal(number, signal.SIG_DFL)
os.dup2(2, 1)
out = Path(line.strip())
"""


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


@contextmanager
def forked_runs(script: Path, imports: str, call: str) -> Iterator[Callable[[Path], psutil.Process]]:
    """What starts a run into a folder, and returns its process.

    Args:
        script: where the script is written.
        imports: lines that are run once.
        call: lines that each run begins with; `out` is its folder.
    """
    script.write_text(imports + FORKING + call)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with subprocess.Popen(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:

        def start(out: Path) -> psutil.Process:
            print(out, file=process.stdin, flush=True)
            assert process.stdout is not None
            return psutil.Process(int(process.stdout.readline()))

        yield start
