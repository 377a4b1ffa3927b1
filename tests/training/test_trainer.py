"""The training loop: the order of the examples, the learning rate, and steps that are split."""

from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from dpo_wrapper.training.train import train
from dpo_wrapper.training.trainer import learning_rate_factor, step_indices
from helpers.runs import assert_metrics_close, make_config, read_metrics, train_in_two_processes


def test_every_epoch_takes_each_example_once_and_orders_differ():
    steps = list(step_indices(10, 4, 2, seed=0))
    assert [len(step) for step in steps] == [4, 4, 2] * 2
    first, second = ([index for step in epoch for index in step] for epoch in (steps[:3], steps[3:]))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert steps == list(step_indices(10, 4, 2, seed=0)) != list(step_indices(10, 4, 2, seed=1))


def test_the_learning_rate_rises_and_falls():
    factors = [learning_rate_factor(step, 20, 0.1) for step in range(20)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert all(a > b for a, b in pairwise(factors[2:])) and factors[-1] < 0.02


@pytest.mark.slow
@pytest.mark.pitfall(23)
@pytest.mark.parametrize("micro_batch_tokens", [1, 250])
def test_micro_batches_give_the_same_update(finished_run, rows, tmp_path, micro_batch_tokens):
    train(make_config(rows, tmp_path / "out", micro_batch_tokens=micro_batch_tokens))
    expected, actual = (load_file(path / "model.safetensors") for path in (finished_run, tmp_path / "out"))
    for name in expected:
        assert torch.allclose(expected[name], actual[name], atol=2e-5), name
    assert_metrics_close(read_metrics(finished_run), read_metrics(tmp_path / "out"))


@pytest.mark.slow
def test_workers_load_the_same_batches(finished_run, rows, tmp_path):
    train(make_config(rows, tmp_path / "out", num_workers=2))
    assert read_metrics(tmp_path / "out") == read_metrics(finished_run)


@pytest.mark.slow
@pytest.mark.pitfall(22)
def test_two_processes_report_what_one_does(finished_run, rows, tmp_path):
    """Uneven: 21 train pairs in steps of 4 leave a step of one pair, for two processes."""
    out = tmp_path / "out"
    train_in_two_processes(tmp_path / "script.py", rows, out)
    assert_metrics_close(read_metrics(finished_run), read_metrics(out))
