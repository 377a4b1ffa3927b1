"""Preparation by several processes, and by processes that are killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from dpo_wrapper.data.prepare import parts
from dpo_wrapper.data.prepare.config import PrepareConfig
from dpo_wrapper.data.prepare.run import prepare_data
from dpo_wrapper.data.prepared import PreparedData
from helpers.forked_scripts import ForkedScript
from helpers.runs import BUNDLED, ROOT, run_under_torchrun

SCRIPT = """
import sys
from pathlib import Path
from typing import Any
from dpo_wrapper.data.prepare import parts
from dpo_wrapper.data.prepare.run import prepare_data
from dpo_wrapper.data.prepare.config import PrepareConfig
parts.MAX_PART_ROWS = 26
prepare_data(PrepareConfig(data=Path(sys.argv[1]), out=Path(sys.argv[2]), workers=2))
"""


RECORDING = """
import os
from dpo_wrapper.data.prepare.part_maker import PartMaker
make = PartMaker.make
def record(self, part):
    with open(f"{os.environ['RECORDS']}/rank{os.environ['RANK']}", "a") as file:
        file.write(f"{part.number}\\n")
    return make(self, part)
PartMaker.make = record
"""

JOINING = """
from accelerate import PartialState
PartialState(cpu=True)
"""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """The bundled data, prepared by one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "MAX_PART_ROWS", 26)
        out = tmp_path_factory.mktemp("prepared") / "out"
        data = prepare_data(PrepareConfig(data=BUNDLED, out=out, workers=1))
    assert data is not None
    return data


@pytest.mark.slow
def test_two_processes_under_torchrun_write_what_one_writes(tmp_path: Path, expected: PreparedData) -> None:
    script = tmp_path / "script.py"
    script.write_text(RECORDING + SCRIPT + JOINING)
    run_under_torchrun(script, BUNDLED, tmp_path / "out", RECORDS=str(tmp_path))
    made = [{int(name) for name in (tmp_path / f"rank{rank}").read_text().split()} for rank in (0, 1)]
    assert made == [set(range(0, 24, 2)), set(range(1, 24, 2))]
    data = PreparedData.open(tmp_path / "out")
    assert data.manifest == expected.manifest
    for name in ("data-00000.arrow", "report.html", "refused.jsonl"):
        assert (data.folder / name).read_bytes() == (expected.folder / name).read_bytes()


@pytest.mark.slow
def test_killed_at_any_moment_and_begun_again(tmp_path: Path, expected: PreparedData) -> None:
    """At ten moments between the first file and the last; then another process ends it."""
    rng, duration, num_unfinished = random.Random(0), 1.5, 0
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for number in range(10):
        out = tmp_path / f"out{number}"
        process = ForkedScript(0, tmp_path / "printed", script, BUNDLED, out).process
        while not out.exists():
            assert process.is_running()
            time.sleep(0.01)
        began, moment = time.perf_counter(), duration * (number + rng.random()) / 10
        while process.is_running() and time.perf_counter() < began + moment:
            time.sleep(0.005)
        workers = []
        try:
            workers = process.children()
            process.kill()
        except psutil.NoSuchProcess:  # it was quicker
            duration = min(duration, time.perf_counter() - began)
        _, alive = psutil.wait_procs([process, *workers], timeout=20)
        assert not alive  # a worker ends with the process that it works for
        if not (out / "manifest.json").exists():
            num_unfinished += 1
            with pytest.raises(ValueError, match="to the end"):
                PreparedData.open(out)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parts, "MAX_PART_ROWS", 26)
            data = prepare_data(PrepareConfig(data=BUNDLED, out=out, workers=1))
        assert data is not None and data.manifest == expected.manifest
        assert not list(out.glob("work-*"))
    assert num_unfinished >= 5


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_program_with_one_sentence(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("parts.MAX_PART_ROWS = 26", "parts.MAX_PART_ROWS = 26\n" + KILLING))
    done = subprocess.run(
        [sys.executable, script, BUNDLED, tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "the worker processes should run to the end, but one was killed" in done.stderr.splitlines()[-1]


KILLING = """
import os, signal
from dpo_wrapper.data.prepare import part_maker
def measure_rows(rows):
    os.kill(os.getpid(), signal.SIGKILL)
part_maker.measure_rows = measure_rows
"""


@pytest.mark.slow
def test_interrupted_by_the_keyboard_and_not_twice_at_a_time(tmp_path: Path, expected: PreparedData) -> None:
    script = tmp_path / "script.py"
    script.write_text(SLOW + SCRIPT.replace("prepare_data(PrepareConfig", RUNNING))
    command = [sys.executable, script, BUNDLED, tmp_path / "out"]
    options: dict[str, Any] = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True}
    first = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, **options)
    while not list(tmp_path.glob("out/work-*/part-*.json")):
        assert first.poll() is None
        time.sleep(0.05)
    second = subprocess.run(command, capture_output=True, **options)
    assert second.returncode == 2 and "but another is doing so: wait for it" in second.stderr
    os.killpg(first.pid, signal.SIGINT)
    _, errors = first.communicate()
    assert first.returncode == 130 and "Traceback" not in errors
    assert errors.splitlines()[-1].endswith("was interrupted; the same command goes on with it.")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "MAX_PART_ROWS", 26)
        data = prepare_data(PrepareConfig(data=BUNDLED, out=tmp_path / "out", workers=1))
    assert data is not None and data.manifest == expected.manifest


SLOW = """
import time
from dpo_wrapper.data.prepare.part_maker import PartMaker
make = PartMaker.make
PartMaker.make = lambda self, part: (time.sleep(2), make(self, part))[1]
"""

RUNNING = """
import signal
import dpo_wrapper.cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it

def run_command(config):
    dpo_wrapper.cli.parse_options = lambda *_: config
    dpo_wrapper.cli.main(["prepare"])

run_command(PrepareConfig"""
