"""`token_log_probs` on shapes, dtypes and layouts of every kind and under autocast."""

import math
from itertools import product

import pytest
import torch

from dpo_wrapper import token_log_probs
from dpo_wrapper.log_probs import choose_impl
from dpo_wrapper.log_probs import torch_tile as chunked
from helpers.log_prob_inputs import (
    OPTIONS,
    Inputs,
    cotangent,
    error,
    in_float64,
    inputs,
    slow_scores,
    tiles,
    truth,
    with_grads,
)


@pytest.mark.parametrize("t, v, d", list(product((0, 1, 3), (1, 2, 37), (1, 5))))
def test_awkward_shapes(impl: str, t: int, v: int, d: int):
    given = inputs(t, v, d)
    for options in OPTIONS.values():
        with tiles(2, 3):
            got = with_grads(given.scores(impl=impl, **options), given)
        for one, expected in zip(got, truth(given, **options), strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-11, atol=1e-13)
        if v == 1:  # the one token there is has probability 1 whatever the weights
            assert all((one == 0).all() for one in got)


def test_empty_axes(impl: str):
    nothing = inputs(0, 1, 3)._replace(weight=torch.zeros(0, 3, dtype=torch.float64), bias=None)
    assert nothing.scores(impl=impl).shape == (0,)  # no vocabulary, and nothing to score
    no_width = inputs(3, 5, 1, bias=False)
    scores = token_log_probs(no_width.hidden[:, :0], no_width.weight[:, :0], no_width.targets, impl=impl)
    assert scores.tolist() == pytest.approx([-math.log(5)] * 3)  # all logits are 0


def test_layouts_of_inputs(impl: str):
    t, v, d = 7, 5, 3
    plain = inputs(t, v, d)
    grids = [torch.zeros(d, t), torch.zeros(v, 2 * d), torch.zeros(3 * v)]
    grids = [grid.double().requires_grad_() for grid in grids]
    with torch.no_grad():
        grids[0].T[:] = plain.hidden
        grids[1][:, ::2] = plain.weight
        grids[2][1::3] = plain.bias
    targets = torch.stack([plain.targets, plain.targets + 100], dim=1)[:, 0]
    assert not targets.is_contiguous()
    with tiles(2, 3):
        scores = Inputs(grids[0].T, grids[1][:, ::2], grids[2][1::3], targets).scores(impl=impl)
        scores.backward(cotangent(t))
    expected = truth(plain)
    got = [scores.detach(), grids[0].grad.T, grids[1].grad[:, ::2], grids[2].grad[1::3]]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_expanded_inputs(impl: str):
    # one row standing for all: its gradient is the sum; and the gradient that comes in is expanded as well
    row, one, targets = inputs(1, 1, 3).hidden, inputs(1, 1, 3).bias, torch.arange(5)
    weight = inputs(5, 5, 3).weight
    with tiles(2, 3):
        expanded = Inputs(row.expand(5, 3), weight, one.expand(5), targets)
        scores = expanded.scores(impl=impl)
        got = torch.autograd.grad(scores.sum(), (row, weight, one))
    repeated = Inputs(row.repeat(5, 1), weight, one.repeat(5), targets)
    expected = torch.autograd.grad(slow_scores(repeated).sum(), (row, weight, one))
    for parts in zip(got, expected, strict=True):
        torch.testing.assert_close(*parts)

    # one row of weights for all tokens: all equally likely, and nothing to learn
    scores = token_log_probs(weight, row.expand(5, 3), targets, impl=impl)
    assert scores.tolist() == pytest.approx([-math.log(5)] * 5)


def test_int32_targets(impl: str):
    given = inputs(7, 5, 3)
    narrow = given._replace(targets=given.targets.int())
    for parts in zip(
        with_grads(given.scores(impl=impl), given), with_grads(narrow.scores(impl=impl), narrow), strict=True
    ):
        assert torch.equal(*parts)


@pytest.mark.parametrize("narrow", ("hidden", "weight", "bias"))
def test_mixed_dtypes(impl: str, narrow: str):
    given = inputs(9, 7, 4, torch.float32)
    small = getattr(given, narrow).detach().bfloat16().requires_grad_()
    given = given._replace(**{narrow: small})
    with tiles(2, 3):
        got = with_grads(given.scores(impl=impl), given)
    assert got[0].dtype == torch.float32  # computed in the wider of the two
    for x, one, expected in zip((got[0], *given.trained), got, truth(given), strict=True):
        assert one.dtype == x.dtype and error(one, expected) < 4 * torch.finfo(x.dtype).eps


def test_an_integer_is_a_number(impl: str):  # as a model's config may hold it
    given = inputs(3, 5, 2)
    assert torch.equal(given.scores(impl=impl, softcap=30), given.scores(impl=impl, softcap=30.0))
    assert torch.equal(given.scores(impl=impl, logit_scale=2), given.scores(impl=impl, logit_scale=2.0))


def test_auto_is_bounded_in_memory():
    assert choose_impl("auto") is choose_impl("auto", torch.device("cpu")) is chunked.token_log_probs
    given = inputs(5, 7, 3)
    assert torch.equal(given.scores(), given.scores(impl="chunked"))


# autocast


def test_backward_inside_autocast_is_as_wide_as_forward_was():
    given = inputs(9, 7, 4, torch.float32)
    expected = with_grads(given.scores(impl="chunked"), given)
    scores = given.scores(impl="chunked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = with_grads(scores, given)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("backward_inside", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_autocast(dtype: torch.dtype, backward_inside: bool):
    given = inputs(61, 67, 16, dtype, scale=2.0)
    expected, results = truth(given), {}
    for impl in ("chunked", "eager"):
        with tiles(5, 9):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                scores = given.scores(impl=impl)
                results[impl] = with_grads(scores, given) if backward_inside else None
            results[impl] = results[impl] or with_grads(scores, given)

    for x, fast, plain, true in zip((scores, *given.trained), *results.values(), expected, strict=True):
        assert fast.dtype == plain.dtype == x.dtype
        assert error(fast, true) < 1.5 * error(plain, true) < 0.02
        if dtype == torch.float32 and x is not given.bias:
            assert error(fast, true) > 1e-4  # the product is in bfloat16: autocast is respected
    assert scores.dtype == torch.float32


def test_gradients_of_float32_weights_under_autocast_are_summed_in_float32(chunked_impl: str):
    given = inputs(1024, 31, 16, torch.float32)
    grad = 0.01 + cotangent(1024).abs()
    wide = in_float64(given)
    expected = torch.autograd.grad(slow_scores(wide), wide.trained, grad)
    with tiles(1, 9):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = given.scores(impl=chunked_impl)
        got = torch.autograd.grad(scores, given.trained, grad.float())
    for one, true in zip(got, expected, strict=True):
        assert one.dtype == torch.float32 and error(one, true) < 0.01


def test_autocast_leaves_float64_alone(impl: str):
    given = inputs(5, 7, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (given.hidden @ given.weight.T).dtype == torch.float64  # as torch does
        scores = given.scores(impl=impl)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, slow_scores(given))
