"""The order of the examples, over epochs, processes and interruptions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_wrapper.data import StepSampler


def test_every_epoch_takes_each_example_once_and_orders_differ():
    steps = list(StepSampler(10, 4, 2, seed=0))
    assert [len(step) for step in steps] == [4, 4, 2] * 2
    first, second = ([index for step in epoch for index in step] for epoch in (steps[:3], steps[3:]))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert steps == list(StepSampler(10, 4, 2, seed=0)) != list(StepSampler(10, 4, 2, seed=1))
    assert steps[4] == StepSampler(10, 4, 2)[4] and StepSampler(10, 4, 2)[2:4] == steps[2:4]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 3), st.integers(1, 5))
def test_processes_share_the_steps_of_one(num_examples, batch_size, epochs, num_processes):
    whole = StepSampler(num_examples, batch_size, epochs, seed=3)
    parts = [
        StepSampler(num_examples, batch_size, epochs, seed=3, rank=rank, num_processes=num_processes)
        for rank in range(num_processes)
    ]
    assert all(len(part) == len(whole) for part in parts)
    for step, indices in enumerate(whole):
        assert len(indices) == whole.step_size(step)
        shares = [part[step] for part in parts]
        real = shares[: len(indices)]  # the others take the first example, to take part
        assert sorted(index for share in real for index in share) == sorted(indices)
        assert all(share == indices[:1] for share in shares[len(indices) :])


def test_a_state_goes_on_in_the_middle_of_an_epoch():
    whole = list(StepSampler(11, 2, 3, seed=5))
    sampler = StepSampler(11, 2, 3, seed=5)
    sampler.load_state_dict(StepSampler(11, 2, 3, seed=5).state_dict(8))
    assert list(sampler) == whole[8:]
    shared = StepSampler(11, 2, 3, seed=5, rank=1, num_processes=2)  # saved by one process, resumed by two
    shared.load_state_dict(sampler.state_dict(4))
    assert list(shared) == [indices[1::2] or indices[:1] for indices in whole[4:]]
    with pytest.raises(ValueError, match="with num_examples 12, but it has 11: go on with the same data"):
        StepSampler(12, 2, 3, seed=5).load_state_dict(sampler.state_dict(4))


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0), (1, 1, -1)])
def test_numbers_that_cannot_be(numbers):
    with pytest.raises(ValueError, match="there should be an example, one or more a step, and 0 or more"):
        StepSampler(*numbers)
    with pytest.raises(ValueError, match=r"the rank should be in \[0, 2\), but it is 2"):
        StepSampler(1, 1, rank=2, num_processes=2)
