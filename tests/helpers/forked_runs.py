"""Runs in processes of their own, forked from one that has imported what they need, which takes longer."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from helpers.runs import ROOT

FORKING = """
import gc, os, signal, sys
from pathlib import Path
gc.freeze()  # what is imported need not be looked at again in each run
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
