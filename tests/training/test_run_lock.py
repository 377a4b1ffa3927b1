"""Two runs at the same time in one folder: the second one is refused, until the first one's process ends."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from dpo_wrapper.training.run_folder import RunFolder
from dpo_wrapper.training.run_lock import lock_run
from dpo_wrapper.training.stopping import TrainingError
from helpers.runs import ROOT, make_config

pytest.importorskip("fcntl")
HOLD = """
import os, sys, time
from pathlib import Path
from dpo_wrapper.training.run_lock import lock_run
lock = lock_run(Path(sys.argv[1]))
worker = os.fork()
print(worker, flush=True) if worker else None
time.sleep(600)
"""


@contextmanager
def locked_by_another_process(folder):
    """Inside, another process has the lock; it is killed at the end, and its worker process lives on."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        worker = int(process.stdout.readline())
        try:
            yield
            process.kill()
            process.wait()
            lock_run(folder).close()
        finally:
            process.kill()
            os.kill(worker, signal.SIGKILL)


@pytest.mark.slow
def test_the_second_run_in_a_folder_is_refused(rows, tmp_path):
    out = tmp_path / "out"
    sentence = f"no other run writes to, but one is writing to {out} now: wait for its end, or name a new"
    first, second, late = (RunFolder(make_config(rows, out)) for _ in range(3))
    late.check(resume=False)  # there is no folder yet
    first.open()
    first.unlock()
    with locked_by_another_process(out):
        with pytest.raises(ValueError, match=sentence):
            second.check(resume=False)
        with pytest.raises(TrainingError, match=sentence):
            late.open()
    second.check(resume=False)
    second.open()
    with pytest.raises(TrainingError, match=f"another run has begun in {out} meanwhile"):
        late.open()


def test_other_processes_of_a_run_take_no_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert lock_run(tmp_path) is None and os.listdir(tmp_path) == []
    monkeypatch.setenv("RANK", "0")
    lock_run(tmp_path).close()
