"""Checks of heads that are divided among two processes, which `test_vocab_parallel.py` runs.

    vocab_parallel_checks.py FOLDER

Each of two processes runs this, and writes FOLDER/0.json or FOLDER/1.json: the traceback of each check by
name, or null.
"""

import json
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dpo_wrapper.log_probs import EXTRAS, FusedLoss, token_log_probs
from helpers.log_prob_inputs import (
    OPTIONS,
    Inputs,
    chunk_size,
    cotangent,
    random_inputs,
    slow_extras,
    softmax_caching,
    tile_size,
    truth,
    values_and_grads,
    weighted_sum,
)

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def slice_of_process(inputs: Inputs, sizes: tuple[int, int]) -> tuple[Inputs, slice]:
    """Leaves with this process's slice of the vocabulary, and that slice."""
    rank = dist.get_rank()
    vocab_slice = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))

    def leaf(x: Tensor, index: slice = slice(None)) -> Tensor:
        return x.detach()[index].clone().requires_grad_(x.requires_grad)

    bias = None if inputs.bias is None else leaf(inputs.bias, vocab_slice)
    return Inputs(leaf(inputs.hidden), leaf(inputs.weight, vocab_slice), bias, inputs.targets), vocab_slice


def check_slices(sizes: tuple[int, int], t: int = 9, **options: Any) -> None:
    group = dist.group.WORLD
    for needs_grad in ((True, True, True), (True, False, False), (True, True, False)):
        inputs = random_inputs(t, sum(sizes), 4, needs_grad=needs_grad)
        true, true_extras = truth(inputs, **options), slow_extras(inputs, **options)
        mine, vocab_slice = slice_of_process(inputs, sizes)
        expected = [*true[:2], *(x[vocab_slice] if len(x) == sum(sizes) else x for x in true[2:])]
        for is_cached in (True, False):
            with tile_size(2, 3), softmax_caching(is_cached):
                got = values_and_grads(mine.scores(vocab_group=group, **options), mine)
                with chunk_size(0):
                    fused_loss = FusedLoss(weighted_sum, torch.arange(t) // 2)
                    scores = mine.scores(vocab_group=group, fused_loss=fused_loss, **options)
                    fused = values_and_grads(scores, mine)
                scores, extras = mine.scores(vocab_group=group, extras=EXTRAS, **options)
                with torch.no_grad():
                    assert torch.equal(mine.scores(vocab_group=group, **options), got[0])
            for plain_value, fused_value, true_value in zip(got, fused, expected, strict=True):
                torch.testing.assert_close(plain_value, true_value, rtol=1e-11, atol=1e-12)
                torch.testing.assert_close(fused_value, true_value, rtol=1e-11, atol=1e-12)
            assert torch.equal(scores.detach(), got[0])
            for name in EXTRAS:
                torch.testing.assert_close(extras[name], true_extras[name], rtol=1e-11, atol=1e-12)


@check
def unequal_slices_of_the_vocabulary() -> None:
    for options in OPTIONS.values():
        check_slices((5, 8), **options)


@check
def a_process_without_entries() -> None:
    check_slices((13, 0))
    check_slices((0, 13))


@check
def no_tokens_and_a_single_entry() -> None:
    check_slices((5, 8), t=0)
    check_slices((1, 1))
    check_slices((1, 0))


@check
def slices_in_bfloat16_and_without_a_bias() -> None:
    inputs = random_inputs(9, 13, 4, torch.bfloat16, bias=False, needs_grad=(True, True, False))
    mine, vocab_slice = slice_of_process(inputs, (5, 8))
    got = values_and_grads(mine.scores(vocab_group=dist.group.WORLD), mine)
    true = truth(inputs)
    true[2] = true[2][vocab_slice]
    for one, other in zip(got, true, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0.05, atol=0.05)


@check
def targets_outside_the_vocabulary_are_refused() -> None:
    mine, _ = slice_of_process(random_inputs(2, 13, 4), (5, 8))
    bad = mine._replace(targets=torch.tensor([12, 13]))
    try:
        bad.scores(vocab_group=dist.group.WORLD)
    except ValueError as caught:
        assert str(caught) == "targets should be in [0, 13), but one is 13."
    else:
        raise AssertionError("a target outside the vocabulary was accepted")


@check
def eager_takes_no_vocab_group() -> None:
    mine, _ = slice_of_process(random_inputs(2, 13, 4), (5, 8))
    try:
        mine.scores(vocab_group=dist.group.WORLD, impl="eager")
    except ValueError as caught:
        assert str(caught) == "impl should be tiled with a vocab_group, but it is 'eager': use 'auto'."
    else:
        raise AssertionError("eager accepted a vocab_group")


def check_sharded(weight: DTensor, bias: DTensor | None, full: Inputs) -> None:
    """Check a sharded head with different tokens on each process, as in data-parallel training."""
    batches = [random_inputs(7, 13, 4, seed=seed) for seed in (1, 2)]
    expected = [truth(Inputs(batch.hidden, *full[1:3], batch.targets)) for batch in batches]
    mine = batches[dist.get_rank()]
    fused_loss = FusedLoss(weighted_sum, torch.arange(7) // 2)
    for options in ({}, {"impl": "eager"}, {"fused_loss": fused_loss}):
        weight.grad = None
        with tile_size(2, 3), chunk_size(0):
            scores = token_log_probs(mine.hidden, weight, mine.targets, bias=bias, **options)
            assert type(scores) is Tensor
            mine.hidden.grad = None
            scores.backward(cotangent(7))
        torch.testing.assert_close(scores.detach(), expected[dist.get_rank()][0])
        torch.testing.assert_close(mine.hidden.grad, expected[dist.get_rank()][1])
        for k, parameter in enumerate((weight, bias)):
            if parameter is None:
                continue
            assert isinstance(parameter.grad, DTensor) and parameter.grad.placements == (Shard(0),)
            assert parameter.grad.to_local().shape == parameter.to_local().shape
            mean = (expected[0][2 + k] + expected[1][2 + k]) / 2
            torch.testing.assert_close(parameter.grad.full_tensor(), mean)
            parameter.grad = None


@check
def distributed_tensors() -> None:
    mesh = init_device_mesh("cpu", (2,))
    full = random_inputs(1, 13, 4)
    weight, bias = (distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_() for x in full[1:3])
    check_sharded(weight, bias, full)


@check
def heads_sharded_by_fsdp2() -> None:
    full = random_inputs(1, 13, 4, bias=False)
    head = nn.Linear(4, 13, bias=False, dtype=torch.float64)
    head.load_state_dict({"weight": full.weight.detach()})
    fully_shard(head, mesh=init_device_mesh("cpu", (2,)))
    assert isinstance(head.weight, DTensor) and head.weight.to_local().shape != (13, 4)
    check_sharded(head.weight, None, full)


def run_checks(folder: Path) -> None:
    torch.set_num_threads(1)
    PartialState(cpu=True, timeout=timedelta(seconds=60))
    problems: dict[str, str | None] = {}
    for name, function in CHECKS.items():
        try:
            function()
            problems[name] = None
        except Exception:
            problems[name] = traceback.format_exc()
        (folder / f"{dist.get_rank()}.json").write_text(json.dumps(problems))


if __name__ == "__main__":
    run_checks(Path(sys.argv[1]))
