"""What `test_sharded_heads.py` runs: checks of heads in parts on two processes of this machine.

    python vocab_parallel_checks.py FOLDER

Writes FOLDER/0.json and FOLDER/1.json: of each check by name, what went wrong, or null.
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
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dpo_wrapper.log_probs import EXTRAS, FusedLoss, token_log_probs
from helpers.log_prob_inputs import (
    OPTIONS,
    Inputs,
    cotangent,
    inputs,
    keeps,
    parts_of,
    slow_extras,
    tiles,
    truth,
    weighted,
    with_grads,
)

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def part_of(given: Inputs, sizes: tuple[int, int]) -> tuple[Inputs, slice]:
    """This process's part of the vocabulary, as leaves."""
    rank = dist.get_rank()
    words = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))

    def leaf(x: Tensor, part: slice = slice(None)) -> Tensor:
        return x.detach()[part].clone().requires_grad_(x.requires_grad)

    bias = None if given.bias is None else leaf(given.bias, words)
    return Inputs(leaf(given.hidden), leaf(given.weight, words), bias, given.targets), words


def check_parts(sizes: tuple[int, int], t: int = 9, **options: Any) -> None:
    group = dist.group.WORLD
    for wanted in ((True, True, True), (True, False, False), (True, True, False)):
        given = inputs(t, sum(sizes), 4, wanted=wanted)
        true, extras_of_one = truth(given, **options), slow_extras(given, **options)
        mine, words = part_of(given, sizes)
        of_part = [true[0], *(one[words] if len(one) == sum(sizes) else one for one in true[2:])]
        of_part.insert(1, true[1])
        for kept in (True, False):
            with tiles(2, 3), keeps(kept):
                got = with_grads(mine.scores(vocab_group=group, **options), mine)
                with parts_of(0):
                    told = FusedLoss(weighted, torch.arange(t) // 2)
                    ahead = with_grads(mine.scores(vocab_group=group, fused_loss=told, **options), mine)
                scores, extras = mine.scores(vocab_group=group, extras=EXTRAS, **options)
                with torch.no_grad():
                    assert torch.equal(mine.scores(vocab_group=group, **options), got[0])
            for one, foretold, other in zip(got, ahead, of_part, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
                torch.testing.assert_close(foretold, other, rtol=1e-11, atol=1e-12)
            assert torch.equal(scores.detach(), got[0])
            for name in EXTRAS:
                torch.testing.assert_close(extras[name], extras_of_one[name], rtol=1e-11, atol=1e-12)


@check
def unequal_parts_of_the_vocabulary() -> None:
    for options in OPTIONS.values():
        check_parts((5, 8), **options)


@check
def a_process_without_words() -> None:
    check_parts((13, 0))
    check_parts((0, 13))


@check
def no_tokens_and_a_single_word() -> None:
    check_parts((5, 8), t=0)
    check_parts((1, 1))
    check_parts((1, 0))


@check
def parts_in_bfloat16_and_without_a_bias() -> None:
    given = inputs(9, 13, 4, torch.bfloat16, bias=False, wanted=(True, True, False))
    mine, words = part_of(given, (5, 8))
    got = with_grads(mine.scores(vocab_group=dist.group.WORLD), mine)
    true = truth(given)
    true[2] = true[2][words]
    for one, other in zip(got, true, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0.05, atol=0.05)


@check
def words_of_no_process_are_refused() -> None:
    mine, _ = part_of(inputs(2, 13, 4), (5, 8))
    bad = mine._replace(targets=torch.tensor([12, 13]))
    try:
        bad.scores(vocab_group=dist.group.WORLD)
    except ValueError as caught:
        assert str(caught) == "targets should be in [0, 13), but one is 13."
    else:
        raise AssertionError("a target beyond the vocabulary was taken")


@check
def eager_takes_no_parts() -> None:
    mine, _ = part_of(inputs(2, 13, 4), (5, 8))
    try:
        mine.scores(vocab_group=dist.group.WORLD, impl="eager")
    except ValueError as caught:
        assert str(caught) == "impl = 'eager' takes a whole head: use 'auto' with a vocab_group."
    else:
        raise AssertionError("eager took a part of a head")


def check_sharded(weight: DTensor, bias: DTensor | None, whole: Inputs) -> None:
    """Each process has tokens of its own, as in data-parallel training."""
    batches = [inputs(7, 13, 4, seed=seed) for seed in (1, 2)]
    expected = [truth(Inputs(batch.hidden, *whole[1:3], batch.targets)) for batch in batches]
    mine = batches[dist.get_rank()]
    told = FusedLoss(weighted, torch.arange(7) // 2)
    for options in ({}, {"impl": "eager"}, {"fused_loss": told}):
        weight.grad = None
        with tiles(2, 3), parts_of(0):
            scores = token_log_probs(mine.hidden, weight, mine.targets, bias=bias, **options)
            assert type(scores) is Tensor
            mine.hidden.grad = None
            scores.backward(cotangent(7))
        torch.testing.assert_close(scores.detach(), expected[dist.get_rank()][0])
        torch.testing.assert_close(mine.hidden.grad, expected[dist.get_rank()][1])
        for k, part in enumerate((weight, bias)):
            if part is None:
                continue
            assert isinstance(part.grad, DTensor) and part.grad.placements == (Shard(0),)
            assert part.grad.to_local().shape == part.to_local().shape
            mean = (expected[0][2 + k] + expected[1][2 + k]) / 2
            torch.testing.assert_close(part.grad.full_tensor(), mean)
            part.grad = None


@check
def distributed_tensors() -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = inputs(1, 13, 4)
    weight, bias = (distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_() for x in whole[1:3])
    check_sharded(weight, bias, whole)


@check
def heads_sharded_by_fsdp2() -> None:
    whole = inputs(1, 13, 4, bias=False)
    head = nn.Linear(4, 13, bias=False, dtype=torch.float64)
    head.load_state_dict({"weight": whole.weight.detach()})
    fully_shard(head, mesh=init_device_mesh("cpu", (2,)))
    assert isinstance(head.weight, DTensor) and head.weight.to_local().shape != (13, 4)
    check_sharded(head.weight, None, whole)


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    init = {"init_method": f"file://{folder / 'meeting'}", "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **init)
    wrong: dict[str, str | None] = {}
    for name, function in CHECKS.items():
        try:
            function()
            wrong[name] = None
        except Exception:
            wrong[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(wrong))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (Path(sys.argv[1]),), nprocs=2)
