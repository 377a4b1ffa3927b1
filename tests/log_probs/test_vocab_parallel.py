"""Output heads in parts on two processes: those of `helpers/vocab_parallel_checks.py`, each by its name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
CHECKS = (
    "unequal_parts_of_the_vocabulary",
    "a_process_without_words",
    "no_tokens_and_a_single_word",
    "parts_in_bfloat16_and_without_a_bias",
    "words_of_no_process_are_refused",
    "eager_takes_no_parts",
    "distributed_tensors",
    "heads_sharded_by_fsdp2",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
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
def test_two_processes(found: list[dict[str, str | None]], name: str):
    for rank, wrong in enumerate(found):
        assert name in wrong, f"process {rank} did not come to {name}: {wrong}"
        assert wrong[name] is None, f"process {rank}:\n{wrong[name]}"


def test_every_check_is_named(found: list[dict[str, str | None]]):
    assert all(tuple(wrong) == CHECKS for wrong in found)
