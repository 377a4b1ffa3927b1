"""Heads that are divided among two processes: each check of `helpers/vocab_parallel_checks.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
CHECKS = (
    "unequal_slices_of_the_vocabulary",
    "a_process_without_entries",
    "no_tokens_and_a_single_entry",
    "slices_in_bfloat16_and_without_a_bias",
    "targets_outside_the_vocabulary_are_refused",
    "eager_takes_no_vocab_group",
    "distributed_tensors",
    "heads_sharded_by_fsdp2",
)


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("needs torch.distributed with gloo")
    folder = tmp_path_factory.mktemp("processes")
    paths = [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(TESTS / "helpers" / "vocab_parallel_checks.py"), str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        timeout=600,
    )
    if done.returncode and not (folder / "1.json").exists():
        pytest.fail(done.stderr[-6000:])
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.pitfall(19)
@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(problems: list[dict[str, str | None]], name: str):
    for rank, of_process in enumerate(problems):
        assert name in of_process, f"process {rank} did not reach {name}: {of_process}"
        assert of_process[name] is None, f"process {rank}:\n{of_process[name]}"


def test_every_check_runs(problems: list[dict[str, str | None]]):
    assert all(tuple(of_process) == CHECKS for of_process in problems)
