"""Heads that are divided among two processes: each check of `helpers/vocab_parallel_checks.py`."""

import json

import pytest
import torch

from helpers import vocab_parallel_checks
from helpers.runs import run_in_two_processes

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
    run_in_two_processes(vocab_parallel_checks.__file__, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.pitfall(19)
@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(problems: list[dict[str, str | None]], name: str):
    for rank, of_process in enumerate(problems):
        assert name in of_process, f"process {rank} did not reach {name}: {of_process}"
        assert of_process[name] is None, f"process {rank}:\n{of_process[name]}"


def test_every_check_runs(problems: list[dict[str, str | None]]):
    assert all(tuple(of_process) == CHECKS for of_process in problems)
