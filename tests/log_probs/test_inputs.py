"""`token_log_probs` with unusual shapes, dtypes and layouts, and under autocast."""

import math
from itertools import product

import pytest
import torch

from dpo_wrapper import token_log_probs
from dpo_wrapper.log_probs import choose_impl, torch_tile
from helpers.log_prob_inputs import (
    OPTIONS,
    Inputs,
    cotangent,
    in_float64,
    random_inputs,
    relative_error,
    slow_scores,
    tile_size,
    truth,
    values_and_grads,
)


@pytest.mark.parametrize("t, v, d", list(product((0, 1, 3), (1, 2, 37), (1, 5))))
def test_awkward_shapes(impl: str, t: int, v: int, d: int):
    inputs = random_inputs(t, v, d)
    for options in OPTIONS.values():
        with tile_size(2, 3):
            got = values_and_grads(inputs.scores(impl=impl, **options), inputs)
        for one, expected in zip(got, truth(inputs, **options), strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-11, atol=1e-13)
        if v == 1:  # the only entry has probability 1 whatever the weights
            assert all((one == 0).all() for one in got)


def test_empty_axes(impl: str):
    empty = random_inputs(0, 1, 3)._replace(weight=torch.zeros(0, 3, dtype=torch.float64), bias=None)
    assert empty.scores(impl=impl).shape == (0,)  # no vocabulary, and nothing to score
    no_width = random_inputs(3, 5, 1, bias=False)
    scores = token_log_probs(no_width.hidden[:, :0], no_width.weight[:, :0], no_width.targets, impl=impl)
    assert scores.tolist() == pytest.approx([-math.log(5)] * 3)  # all logits are 0


def test_layouts_of_inputs(impl: str):
    t, v, d = 7, 5, 3
    plain = random_inputs(t, v, d)
    grids = [torch.zeros(d, t), torch.zeros(v, 2 * d), torch.zeros(3 * v)]
    grids = [grid.double().requires_grad_() for grid in grids]
    with torch.no_grad():
        grids[0].T[:] = plain.hidden
        grids[1][:, ::2] = plain.weight
        grids[2][1::3] = plain.bias
    targets = torch.stack([plain.targets, plain.targets + 100], dim=1)[:, 0]
    assert not targets.is_contiguous()
    with tile_size(2, 3):
        scores = Inputs(grids[0].T, grids[1][:, ::2], grids[2][1::3], targets).scores(impl=impl)
        scores.backward(cotangent(t))
    expected = truth(plain)
    got = [scores.detach(), grids[0].grad.T, grids[1].grad[:, ::2], grids[2].grad[1::3]]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_expanded_inputs(impl: str):
    # one row is expanded to all tokens: its gradient is a sum. The gradient of the scores is expanded too.
    row, one, targets = random_inputs(1, 1, 3).hidden, random_inputs(1, 1, 3).bias, torch.arange(5)
    weight = random_inputs(5, 5, 3).weight
    with tile_size(2, 3):
        expanded = Inputs(row.expand(5, 3), weight, one.expand(5), targets)
        scores = expanded.scores(impl=impl)
        got = torch.autograd.grad(scores.sum(), (row, weight, one))
    repeated = Inputs(row.repeat(5, 1), weight, one.repeat(5), targets)
    expected = torch.autograd.grad(slow_scores(repeated).sum(), (row, weight, one))
    for pair in zip(got, expected, strict=True):
        torch.testing.assert_close(*pair)

    # one row of weights for all entries: all are equally likely
    scores = token_log_probs(weight, row.expand(5, 3), targets, impl=impl)
    assert scores.tolist() == pytest.approx([-math.log(5)] * 5)


def test_int32_targets(impl: str):
    inputs = random_inputs(7, 5, 3)
    narrow = inputs._replace(targets=inputs.targets.int())
    for pair in zip(
        values_and_grads(inputs.scores(impl=impl), inputs),
        values_and_grads(narrow.scores(impl=impl), narrow),
        strict=True,
    ):
        assert torch.equal(*pair)


@pytest.mark.parametrize("narrow", ("hidden", "weight", "bias"))
def test_mixed_dtypes(impl: str, narrow: str):
    inputs = random_inputs(9, 7, 4, torch.float32)
    small = getattr(inputs, narrow).detach().bfloat16().requires_grad_()
    inputs = inputs._replace(**{narrow: small})
    with tile_size(2, 3):
        got = values_and_grads(inputs.scores(impl=impl), inputs)
    assert got[0].dtype == torch.float32  # computed in the wider of the two
    for x, one, expected in zip((got[0], *inputs.trained), got, truth(inputs), strict=True):
        assert one.dtype == x.dtype and relative_error(one, expected) < 4 * torch.finfo(x.dtype).eps


def test_options_may_be_integers(impl: str):  # as in some models' configs
    inputs = random_inputs(3, 5, 2)
    assert torch.equal(inputs.scores(impl=impl, softcap=30), inputs.scores(impl=impl, softcap=30.0))
    assert torch.equal(inputs.scores(impl=impl, logit_scale=2), inputs.scores(impl=impl, logit_scale=2.0))


def test_auto_on_the_cpu_is_chunked():
    assert choose_impl("auto") is choose_impl("auto", torch.device("cpu")) is torch_tile.token_log_probs
    inputs = random_inputs(5, 7, 3)
    assert torch.equal(inputs.scores(), inputs.scores(impl="chunked"))


# autocast


def test_backward_inside_autocast_keeps_the_dtypes_of_forward():
    inputs = random_inputs(9, 7, 4, torch.float32)
    expected = values_and_grads(inputs.scores(impl="chunked"), inputs)
    scores = inputs.scores(impl="chunked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = values_and_grads(scores, inputs)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("backward_inside", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_autocast(dtype: torch.dtype, backward_inside: bool):
    inputs = random_inputs(61, 67, 16, dtype, scale=2.0)
    expected, results = truth(inputs), {}
    for impl in ("chunked", "eager"):
        with tile_size(5, 9):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                scores = inputs.scores(impl=impl)
                results[impl] = values_and_grads(scores, inputs) if backward_inside else None
            results[impl] = results[impl] or values_and_grads(scores, inputs)

    for x, fast, plain, true in zip((scores, *inputs.trained), *results.values(), expected, strict=True):
        assert fast.dtype == plain.dtype == x.dtype
        assert relative_error(fast, true) < 1.5 * relative_error(plain, true) < 0.02
        if dtype == torch.float32 and x is not inputs.bias:
            assert relative_error(fast, true) > 1e-4  # the product is in bfloat16: autocast is respected
    assert scores.dtype == torch.float32


def test_gradients_of_float32_weights_under_autocast_are_summed_in_float32(tiled_impl: str):
    inputs = random_inputs(512, 31, 16, torch.float32)
    grad = 0.01 + cotangent(512).abs()
    wide = in_float64(inputs)
    expected = torch.autograd.grad(slow_scores(wide), wide.trained, grad)
    with tile_size(1, 16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = inputs.scores(impl=tiled_impl)
        got = torch.autograd.grad(scores, inputs.trained, grad.float())
    for one, true in zip(got, expected, strict=True):
        assert one.dtype == torch.float32 and relative_error(one, true) < 0.01


def test_autocast_leaves_float64_alone(impl: str):
    inputs = random_inputs(5, 7, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (inputs.hidden @ inputs.weight.T).dtype == torch.float64  # as torch does
        scores = inputs.scores(impl=impl)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, slow_scores(inputs))
