"""The Triton kernel: interpreted on the CPU in a process of its own, and on CUDA where it is available."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


def run_checks(**environment: str) -> str:
    """Triton decides when it is imported whether it compiles or interprets, hence the process."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            str(TESTS / "helpers" / "triton_checks.py"),
        ],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        env=inherited | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_interpreted():
    passed = re.search(r"(\d+) passed, 3 skipped", run_checks(TRITON_INTERPRET="1"))
    assert passed and int(passed[1]) > 90


@pytest.mark.cuda
def test_compiled():
    assert re.search(r"\d+ passed", run_checks())
