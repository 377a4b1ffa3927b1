"""The update of a step is the same, in float64 to 1e-10, however it is split."""

import pytest
from safetensors.torch import load_file

from helpers import exact_steps
from helpers.exact_steps import CASES, UNEVEN, largest_difference, take_steps, write_inputs
from helpers.runs import run_in_two_processes

TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_add_up_exactly(inputs, tmp_path, case):
    whole = take_steps(case, inputs, tmp_path / "out")
    assert whole["number of micro-batches"] == 1
    assert all(value.isfinite().all() for value in whole.values())
    splits = {
        "8x1": {"micro_batch_tokens": 1},
        "2x4": {"groups": [[0, 1, 2, 3], [4, 5, 6, 7]]},
        "uneven": {"groups": [[6, 0, 3, 1, 7], [5], [2, 4]]},
    }
    for name, options in splits.items():
        split = take_steps(case, inputs, tmp_path / "out", **options)
        assert split["number of micro-batches"] > 1
        assert largest_difference(whole, split) < (TOLERANCE, ""), name


@pytest.mark.slow
@pytest.mark.pitfall(22)
def test_processes_add_up_exactly(inputs, tmp_path):
    run_in_two_processes(exact_steps.__file__, inputs, tmp_path)
    for case in CASES:
        for name, (num_rows, batch_size) in UNEVEN.items():
            sizes = {"num_rows": num_rows, "batch_size": batch_size}
            expected = take_steps(case, inputs, tmp_path / "out", **sizes)
            actual = load_file(tmp_path / f"{case}, {name}.safetensors")
            assert largest_difference(expected, actual) < (TOLERANCE, ""), (case, name)
