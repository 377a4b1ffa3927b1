"""Gradients that `token_log_probs` makes in forward, for a loss that it is told of."""

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dpo_wrapper.log_probs import FusedLoss
from dpo_wrapper.log_probs import fused_backward as module
from helpers.log_prob_inputs import (
    DTYPES,
    FAST,
    OPTIONS,
    WANTED,
    Inputs,
    cotangent,
    error,
    inputs,
    keeps_bytes,
    parts_of,
    tiles,
    truth,
    weighted,
    with_grads,
)

T, V, D = 12, 45, 6
GROUPS = torch.tensor([0, 0, 1, 1, 2, 2, 2, 0, 3, 3, 3, 3])
TRAINED = [wanted for wanted in WANTED if wanted[1] or wanted[2]]  # else a gradient is ready anyhow


def never(*args, **kwargs):
    raise AssertionError("gradients were computed again")


@pytest.mark.parametrize("tokens", (1, 5, 99))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("wanted", TRAINED, ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_what_was_foretold(dtype: torch.dtype, wanted: tuple, options: dict, tokens: int, monkeypatch):
    monkeypatch.setattr(module, "gradients_of", never)
    given = inputs(T, V, D, dtype, wanted=wanted)
    plain = with_grads(given.scores(impl="eager", **options), given)
    expected = truth(given, **options)
    for factor in (1.0, -0.5, 65536.0):  # a scaler's, or a share of a step

        def loss(scores: Tensor, factor: float = factor) -> Tensor:
            return weighted(scores) * factor

        with tiles(3, 8), parts_of(tokens):
            found = with_grads(
                given.scores(impl="chunked", fused_loss=FusedLoss(loss, GROUPS), **options), given
            )
        for one, eager, true in zip(found, plain, expected, strict=True):
            assert one.dtype == eager.dtype
            assert error(one, true) <= max(3 * error(eager, true), 3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("tokens", (1, 99))
@pytest.mark.parametrize("wanted", TRAINED, ids=str)
def test_what_comes_otherwise_is_computed_again(wanted: tuple, tokens: int):
    given = inputs(T, V, D, wanted=wanted)
    losses = {
        "of another form": lambda scores: scores.square().sum(),
        "not of the scores": lambda scores: torch.ones((), requires_grad=True) * 2,
        "without a gradient": lambda scores: scores.detach().sum(),
        "of a part of them": lambda scores: weighted(scores)[None].sum() - scores[3],
        "not a number": lambda scores: (scores * torch.nan).sum(),
        "of groups that are none": lambda scores: weighted(scores) * scores.sum().detach().exp(),
    }
    for name, loss in losses.items():
        with tiles(3, 8), parts_of(tokens):
            found = with_grads(given.scores(impl="chunked", fused_loss=FusedLoss(loss, GROUPS)), given)
        for one, true in zip(found, truth(given), strict=True):
            torch.testing.assert_close(one, true, msg=name)


def test_nothing_comes_back_and_nothing_was_foretold():
    given = inputs(T, V, D)
    scores = given.scores(impl="chunked", fused_loss=FusedLoss(lambda scores: (scores * 0.0).sum()))
    found = torch.autograd.grad((scores * 0.0).sum(), given.trained)
    assert all((x == 0).all() for x in found)


@pytest.mark.parametrize("foretold", ("right", "wrong", "frozen"))
def test_the_number_of_products(foretold: str):
    given = inputs(T, V, D, torch.float32, bias=False, wanted=(True, foretold != "frozen", False))
    counters = [FlopCounterMode(display=False) for _ in range(2)]

    def loss(scores: Tensor) -> Tensor:
        return scores.square().sum() if foretold == "wrong" else scores.sum() / 3

    with tiles(3, 8), parts_of(4):
        with counters[0]:
            scores = given.scores(impl="chunked", fused_loss=FusedLoss(loss, GROUPS))
        with counters[1]:
            scores.sum().backward()
    products = {"right": [3, 0], "wrong": [3, 3], "frozen": [2, 0]}[foretold]
    assert [counter.get_total_flops() for counter in counters] == [n * 2 * T * D * V for n in products]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_gradients_could_not_be_added_up_nothing_is_made_ahead(dtype: torch.dtype):
    for tokens, parts in ((4, 2), (99, 1)):
        given, counter = inputs(T, V, D, dtype, bias=False), FlopCounterMode(display=False)
        expected, eager = truth(given), with_grads(given.scores(impl="eager"), given)
        with tiles(3, 8), parts_of(tokens):
            with counter:
                scores = given.scores(impl="chunked", fused_loss=FusedLoss(weighted, GROUPS))
            for one, plain, true in zip(with_grads(scores, given), eager, expected, strict=True):
                assert error(one, true) <= max(3 * error(plain, true), 3 * torch.finfo(dtype).eps)
        narrow = torch.finfo(dtype).bits < 32
        plainly = dtype == torch.float16 or (narrow and parts > 1)
        assert counter.get_total_flops() == (1 if plainly else 3) * 2 * T * D * V


@pytest.mark.parametrize(
    "dtypes",
    (
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        (torch.float32, torch.float32, torch.float16),
    ),
    ids=str,
)
def test_no_gradient_is_rounded_to_float16_before_a_scaler(dtypes: tuple[torch.dtype, ...]):
    given = inputs(T, V, D, torch.float32)
    given = Inputs(
        *(x.detach().to(d).requires_grad_() for x, d in zip(given[:3], dtypes, strict=True)), given.targets
    )
    with parts_of(4):
        scores = given.scores(
            impl="chunked", fused_loss=FusedLoss(lambda scores: weighted(scores) * 1e-7, GROUPS)
        )
        (weighted(scores) * 1e-7 * 65536).backward()
    for one, true in zip(given.trained, truth(given)[1:], strict=True):
        assert error(one.grad, true * 1e-7 * 65536) < 3e-3


def test_under_autocast():
    given = inputs(T, V, D, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), parts_of(4):
        found = with_grads(given.scores(impl="chunked", fused_loss=FusedLoss(weighted, GROUPS)), given)
        plain = with_grads(given.scores(impl="eager"), given)
    for one, eager, true in zip(found, plain, truth(given), strict=True):
        assert one.dtype == torch.float32 and error(one, true) < 3 * error(eager, true)


def test_backward_may_run_twice():
    given = inputs(T, V, D)
    with parts_of(4):
        scores = given.scores(impl="chunked", fused_loss=FusedLoss(weighted, GROUPS))
    grad = cotangent(T)
    first = torch.autograd.grad(scores, given.trained, grad, retain_graph=True)
    second = torch.autograd.grad(scores, given.trained, 2 * grad)
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(2 * one, two)


def test_gradients_are_handed_over_and_not_copied():
    given = inputs(T, V, D, torch.float32)
    scores = given.scores(impl="chunked", fused_loss=FusedLoss(weighted, GROUPS))
    made = [x.data_ptr() for x in scores.grad_fn.made]
    weighted(scores).backward()
    assert [x.grad.data_ptr() for x in given.trained] == made


def test_differentiating_twice_is_refused():
    given = inputs(T, V, D)
    loss = given.scores(impl="chunked", fused_loss=FusedLoss(weighted, GROUPS)).sum().sigmoid()
    with pytest.raises(RuntimeError, match=r"differentiated twice"):
        torch.autograd.grad(loss, given.trained, create_graph=True)


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_without_gradients_the_loss_is_not_asked(mode):
    with mode():
        inputs(T, V, D).scores(impl="chunked", fused_loss=FusedLoss(never, GROUPS))
    inputs(T, V, D, wanted=(True, False, False)).scores(impl="chunked", fused_loss=FusedLoss(never, GROUPS))
    inputs(0, V, D).scores(impl="chunked", fused_loss=FusedLoss(never, GROUPS[:0])).sum().backward()


def test_with_extras_the_loss_is_not_asked():
    given = inputs(T, V, D)
    scores, _ = given.scores(impl="chunked", extras=["entropy"], fused_loss=FusedLoss(never, GROUPS))
    for one, true in zip(with_grads(scores, given), truth(given), strict=True):
        torch.testing.assert_close(one, true)


def test_eager_needs_no_telling():
    given = inputs(T, V, D)
    for one, true in zip(
        with_grads(given.scores(impl="eager", fused_loss=FusedLoss(never)), given), truth(given), strict=True
    ):
        torch.testing.assert_close(one, true)


@pytest.mark.pitfall(24)
def test_inside_activation_checkpointing():
    given = inputs(T, V, D)
    with parts_of(4):
        scores = torch.utils.checkpoint.checkpoint(
            lambda: given.scores(impl="chunked", fused_loss=FusedLoss(weighted, GROUPS)), use_reentrant=False
        )
    with FlopCounterMode(display=False) as counter:
        found = with_grads(scores, given)
    for one, true in zip(found, truth(given), strict=True):
        torch.testing.assert_close(one, true)
    # forward once more, for backward alone and not for each part
    assert counter.get_total_flops() == 3 * 2 * T * D * V + 2 * T * V


@drawn(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), most=st.integers(1, 30), seed=st.integers()
)
@FAST
def test_parts_are_whole_groups(sizes: list[int], most: int, seed: int):
    numbers = torch.tensor([7 * k - 20 for k, size in enumerate(sizes) for _ in range(size)])
    shuffled = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed % 2**31))]
    parts = [
        torch.arange(len(numbers))[rows] for rows in FusedLoss(never, shuffled).parts(len(numbers), most)
    ]
    assert sorted(torch.cat(parts).tolist()) == list(range(len(numbers)))
    seen = [set(shuffled[rows].tolist()) for rows in parts]
    assert sum(map(len, seen)) == len(set.union(*seen))  # no group in two parts
    assert all(len(rows) <= most or len(groups) == 1 for rows, groups in zip(parts, seen, strict=True))
    assert len(parts) <= 1 + 2 * len(numbers) // most  # two neighbours would not fit into one


def test_of_a_group_without_room_a_part_is_computed_again():
    t, v, d = 64, 96, 4
    given = inputs(t, v, d, torch.float32, bias=False)
    counter = FlopCounterMode(display=False)
    with tiles(t, 16, per_value=4), keeps_bytes(2 * t * 16 * 4), parts_of(0), counter:
        found = with_grads(given.scores(impl="chunked", fused_loss=FusedLoss(weighted)), given)
    # of its six tiles two are kept
    assert counter.get_total_flops() == (3 + 4 / 6) * 2 * t * v * d
    for one, true in zip(found, truth(given), strict=True):
        assert error(one, true) < 1e-6


@pytest.mark.parametrize(
    "fused_loss, problem",
    (
        (weighted, "fused_loss should be a FusedLoss, but it is a function"),
        (
            FusedLoss(weighted, GROUPS[:5]),
            r"one number for each target, but their shapes are \(5,\) and \(12,\)",
        ),
        (FusedLoss(lambda scores: scores), "should return a tensor without dimensions"),
        (FusedLoss(lambda scores: 1.0), "should return a tensor without dimensions"),
    ),
)
def test_refusals(fused_loss: object, problem: str):
    with pytest.raises((TypeError, ValueError), match=problem):
        inputs(T, V, D).scores(impl="chunked", fused_loss=fused_loss)


def test_refusals_when_made():
    with pytest.raises(TypeError, match="should be a function"):
        FusedLoss(3.0)
    with pytest.raises(TypeError, match="int64 tensor"):
        FusedLoss(weighted, GROUPS.float())


def test_gradcheck():
    given = inputs(5, 5, 3)

    def loss(weight: Tensor, hidden: Tensor) -> Tensor:
        told = FusedLoss(lambda scores: scores.sigmoid().sum(), torch.arange(5))
        return (
            Inputs(hidden, weight, None, given.targets)
            .scores(impl="chunked", fused_loss=told)
            .sigmoid()
            .sum()
        )

    with tiles(2, 2), parts_of(2):
        # a second time gradients are computed again, in another order
        assert torch.autograd.gradcheck(loss, (given.weight, given.hidden), nondet_tol=1e-12)
