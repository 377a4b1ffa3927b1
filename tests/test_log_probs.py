"""`token_log_probs` against the slow lines of its docstring in float64: values, gradients, memory, errors."""

import json
import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dpo_wrapper import token_log_probs
from dpo_wrapper.log_probs import accumulation_dtype, chunked, implementation, log_probs_from_logits

HERE = Path(__file__).parent
MEGABYTE = 10**6
FAST = settings(max_examples=60, deadline=None, derandomize=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IMPLS = ("chunked", "eager")
# in the order of `Inputs`: everything trains, the head is frozen, and so on
WANTED = [wanted for wanted in product((True, False), repeat=3) if any(wanted)]
OPTIONS = {
    "plain": {},
    "scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 2.5},
    "scale-softcap": {"logit_scale": -1.7, "softcap": 1.5},
}


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor

    def scores(self, **options) -> Tensor:
        return token_log_probs(self.hidden, self.weight, self.targets, bias=self.bias, **options)

    @property
    def trained(self) -> list[Tensor]:
        return [x for x in self[:3] if x is not None and x.requires_grad]


def inputs(
    t: int,
    v: int,
    d: int,
    dtype: torch.dtype = torch.float64,
    *,
    bias: bool = True,
    wanted: tuple[bool, bool, bool] = (True, True, True),
    scale: float = 1.0,
    seed: int = 0,
) -> Inputs:
    """Random inputs whose logits have a standard deviation of about `scale`."""
    generator = Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], size: float, requires_grad: bool) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * size
        return values.to(dtype).requires_grad_(requires_grad)

    return Inputs(
        normal((t, d), scale, wanted[0]),
        normal((v, d), d**-0.5, wanted[1]),
        normal((v,), 0.5, wanted[2]) if bias else None,
        torch.randint(0, v, (t,), generator=generator),
    )


def in_float64(given: Inputs) -> Inputs:
    """The same numbers, rounding included, as leaves of their own."""

    def widen(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().double().requires_grad_(x.requires_grad)

    return Inputs(widen(given.hidden), widen(given.weight), widen(given.bias), given.targets)


def slow_scores(given: Inputs, logit_scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """The lines of the docstring, written out again."""
    logits = given.hidden @ given.weight.T
    if given.bias is not None:
        logits = logits + given.bias
    logits = logit_scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1)[range(len(given.targets)), given.targets]


def cotangent(t: int) -> Tensor:
    """What comes back from a loss: of either sign, some of it zero."""
    generator = Generator().manual_seed(99)
    grad = torch.randn(t, generator=generator, dtype=torch.float64)
    return grad * (torch.rand(t, generator=generator) < 0.8)


def with_grads(scores: Tensor, given: Inputs) -> list[Tensor]:
    """Scores, then the gradient of each input that wants one."""
    grad = cotangent(len(scores)).to(scores.dtype)
    return [scores.detach(), *torch.autograd.grad(scores, given.trained, grad)]


def truth(given: Inputs, **options) -> list[Tensor]:
    wide = in_float64(given)
    return with_grads(slow_scores(wide, **options), wide)


def error(got: Tensor, expected: Tensor) -> float:
    """Root mean square error, relative to the root mean square."""
    assert got.shape == expected.shape and got.isfinite().all()
    return float((got.detach().double() - expected).norm() / expected.norm().clamp(min=1e-30))


def budget(v: int, tokens: int, per_value: int = 8):
    """Inside, a block of logits holds `tokens` tokens."""
    return patch.object(chunked, "BLOCK_BYTES", v * tokens * per_value)


# numbers by hand


@pytest.mark.parametrize("impl", ("auto", *IMPLS))
def test_numbers_by_hand(impl: str):
    hidden, targets = torch.tensor([[1.0, 5.0]] * 2), torch.tensor([0, 1])

    # logits 0 and ln 3: probabilities 1/4 and 3/4
    weight = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    scores = token_log_probs(hidden, weight, targets, impl=impl)
    assert scores.tolist() == pytest.approx([math.log(1 / 4), math.log(3 / 4)], abs=1e-6)

    # the scale is of the sum: 2 (ln 3 + ln 5 / 2) = ln 45, so 1/46 and 45/46
    bias = torch.tensor([0.0, math.log(5) / 2])
    scores = token_log_probs(hidden, weight, targets, bias=bias, logit_scale=2.0, impl=impl)
    assert scores.tolist() == pytest.approx([math.log(1 / 46), math.log(45 / 46)], abs=1e-6)

    # the cap is of the scaled logit: 1 tanh(2 (artanh(ln 2) / 2) / 1) = ln 2, so 1/3 and 2/3
    weight = torch.tensor([[0.0, 0.0], [math.atanh(math.log(2)) / 2, 0.0]])
    scores = token_log_probs(hidden, weight, targets, logit_scale=2.0, softcap=1.0, impl=impl)
    assert scores.tolist() == pytest.approx([math.log(1 / 3), math.log(2 / 3)], abs=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_by_hand(impl: str):
    # d log p(target) / d logits = onehot(target) - p, with p = (1/4, 3/4) and target 0: (3/4, -3/4)
    hidden = torch.tensor([[2.0, 5.0]], requires_grad=True)
    weight = torch.tensor([[0.0, 0.0], [math.log(3) / 2, 0.0]], requires_grad=True)
    bias = torch.zeros(2, requires_grad=True)
    token_log_probs(hidden, weight, torch.tensor([0]), bias=bias, impl=impl).sum().backward()
    assert bias.grad.tolist() == pytest.approx([3 / 4, -3 / 4], abs=1e-6)
    assert weight.grad.flatten().tolist() == pytest.approx([1.5, 3.75, -1.5, -3.75], abs=1e-5)
    assert hidden.grad.flatten().tolist() == pytest.approx([-3 / 4 * math.log(3) / 2, 0.0], abs=1e-6)


# accuracy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no-bias"))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_error_is_that_of_the_plain_lines_in_the_same_dtype(dtype: torch.dtype, bias: bool, options: dict):
    given = inputs(83, 131, 24, dtype, bias=bias, wanted=(True, True, bias), scale=2.0)
    expected = truth(given, **options)
    eager = with_grads(given.scores(impl="eager", **options), given)
    with budget(131, 19):  # blocks of 17 tokens and one of 15, or fewer where a token takes less
        blockwise = with_grads(given.scores(impl="chunked", **options), given)
    at_once = with_grads(given.scores(impl="chunked", **options), given)

    assert blockwise[0].dtype == eager[0].dtype == accumulation_dtype(dtype)
    eps = torch.finfo(dtype).eps
    for parts in zip(expected, eager, blockwise, at_once, strict=True):
        plain, *fast = (error(part, parts[0]) for part in parts[1:])
        assert plain < 8 * eps
        # the truth is no truer than float64 itself
        assert max(fast) < (8 * eps if dtype == torch.float64 else 1.5 * plain)
    for x, grad in zip(given.trained, blockwise[1:], strict=True):
        assert grad.dtype == x.dtype


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_after_the_product_all_is_in_float32(impl: str, dtype: torch.dtype):
    # the products 1 and 2 are exact in any dtype, what follows is not: 0.3 (1 + 3/256), and tanh of it
    hidden, weight = torch.ones(2, 1, dtype=dtype), torch.tensor([[1.0], [2.0]]).to(dtype)
    given = Inputs(hidden, weight, torch.tensor([3 / 256, 0.0]).to(dtype), torch.tensor([0, 1]))
    for options in ({}, {"logit_scale": 0.3}, {"softcap": 0.7}, {"logit_scale": 0.3, "softcap": 0.7}):
        scores = given.scores(impl=impl, **options)
        torch.testing.assert_close(scores, slow_scores(in_float64(given), **options).float())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_many_blocks_lose_no_precision(dtype: torch.dtype):
    # 1024 blocks of one token. A running sum in bfloat16 stops growing where a term is 1/256 of it.
    given = inputs(1024, 31, 16, dtype)
    grad = 0.01 + cotangent(1024).abs()  # all of one sign, as in an SFT term: the sums grow
    wide = in_float64(given)
    expected = torch.autograd.grad(slow_scores(wide), wide.trained, grad)
    one = torch.autograd.grad(given.scores(impl="chunked"), given.trained, grad.float())
    with budget(1, 1):
        scores = given.scores(impl="chunked")
        many = torch.autograd.grad(scores, given.trained, grad.float())
    for parts in zip(many, one, expected, strict=True):
        assert error(parts[0], parts[2]) < 1.4 * error(parts[1], parts[2])

    # what it would have been: the test can tell
    p = (wide.hidden @ wide.weight.T + wide.bias).softmax(-1)
    d_logits = grad[:, None] * (torch.nn.functional.one_hot(given.targets, 31) - p)
    careless = torch.zeros(31, dtype=dtype)
    for row in d_logits:
        careless += row.to(dtype)
    assert error(careless, expected[2]) > 4 * error(many[2], expected[2])


@given(
    t=st.integers(1, 9),
    v=st.integers(1, 12),
    tokens=st.integers(0, 10),
    softcap=st.sampled_from([None, 1.5]),
    seed=st.integers(0, 99),
)
@FAST
def test_the_size_of_blocks_changes_nothing(t: int, v: int, tokens: int, softcap: float | None, seed: int):
    given = inputs(t, v, 3, seed=seed)
    with budget(v, tokens):
        scores = with_grads(given.scores(impl="chunked", softcap=softcap), given)
    for got, expected in zip(scores, truth(given, softcap=softcap), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


# gradients


def names(wanted: tuple[bool, bool, bool]) -> str:
    return "+".join(name for name, on in zip(("hidden", "weight", "bias"), wanted, strict=True) if on)


@pytest.mark.parametrize(
    "options", ({}, {"logit_scale": 0.7, "softcap": 1.5}), ids=("plain", "scale-softcap")
)
@pytest.mark.parametrize(
    "wanted, bias",
    [(wanted, True) for wanted in WANTED] + [(wanted, False) for wanted in WANTED if not wanted[2]],
    ids=lambda x: names(x) if isinstance(x, tuple) else "" if x else "no-bias",
)
def test_gradcheck(wanted: tuple[bool, bool, bool], bias: bool, options: dict):
    given = inputs(5, 4, 3, bias=bias, wanted=wanted)

    def scores(*trained: Tensor) -> Tensor:
        rest = iter(trained)
        parts = [next(rest) if x is not None and x.requires_grad else x for x in given[:3]]
        return Inputs(*parts, given.targets).scores(impl="chunked", **options)

    with budget(4, 2, 16 if options else 8):  # 2, 2 and 1 tokens
        head = chunked.Head(given.weight, None, 1.0, options.get("softcap"), torch.float64)
        assert [len(range(5)[part]) for part in head.blocks(5)] == [2, 2, 1]
        assert torch.autograd.gradcheck(scores, given.trained)


@pytest.mark.parametrize("wanted", WANTED, ids=names)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_only_gradients_that_are_wanted_are_computed(wanted: tuple[bool, bool, bool], dtype: torch.dtype):
    t, d, v = 7, 5, 37
    given = inputs(t, v, d, dtype, wanted=wanted)
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **kwargs: 2 * a[0] * a[1] * b[1]}
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with budget(v, 3), counter, Largest() as largest:
        given.scores(impl="chunked").sum().backward()
    assert [x is not None and x.grad is not None for x in given[:3]] == list(wanted)
    # forward, the same again in backward, and one product each for hidden and weight
    assert counter.get_total_flops() == (2 + wanted[0] + wanted[1]) * 2 * t * d * v
    assert ((v, d) in largest.shapes) == wanted[1]


class Largest(TorchDispatchMode):
    """Shapes and the most bytes of what operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and not func.is_view:
                self.shapes.add(tuple(x.shape))
                self.most = max(self.most, x.numel() * x.itemsize)
        return result


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_larger_than_a_block_or_a_gradient_is_made(options: dict):
    t, v, d = 200, 300, 4
    given = inputs(t, v, d, torch.float32)
    with patch.object(chunked, "BLOCK_BYTES", v * 4 * 16), Largest() as largest:
        given.scores(impl="chunked", **options).sum().backward()
    assert largest.most <= v * 4 * 16 and (t, v) not in largest.shapes

    with Largest() as largest:  # the measure sees it where it happens
        given.scores(impl="eager", **options).sum().backward()
    assert largest.most == t * v * 4 and (t, v) in largest.shapes


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_given_is_written_to(impl: str):
    given = inputs(7, 5, 3, torch.float32)
    before = [x.detach().clone() for x in given]
    with budget(5, 2):
        scores = given.scores(impl=impl, logit_scale=2.0, softcap=3.0)
        grad = cotangent(7).float()
        first = torch.autograd.grad(scores, given.trained, grad, retain_graph=True)
        kept = scores.detach().clone()
        second = torch.autograd.grad(scores, given.trained, grad)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))
    assert torch.equal(grad, cotangent(7).float()) and torch.equal(scores, kept)


def test_weights_changed_before_backward_are_noticed():
    given = inputs(3, 5, 2)  # backward computes the logits again, so it would use the new ones
    scores = given.scores(impl="chunked")
    with torch.no_grad():
        given.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()


def test_double_backward_is_refused():
    given = inputs(3, 5, 2)
    with pytest.raises(RuntimeError, match="differentiate"):
        loss = given.scores(impl="chunked").sum().sigmoid()
        grads = torch.autograd.grad(loss, given.trained, create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()


def test_a_penalty_on_gradients_is_never_dropped_silently():
    given = inputs(3, 5, 2)
    with pytest.raises(RuntimeError, match="differentiate"):
        loss = -given.scores(impl="chunked").sum()  # linear in the scores, as SFT is
        (grad,) = torch.autograd.grad(loss, given.hidden, create_graph=True)
        (loss + grad.square().sum()).backward()


def test_eager_can_be_differentiated_twice():
    given = inputs(3, 5, 2)
    assert torch.autograd.gradgradcheck(
        lambda *trained: Inputs(*trained, given.targets).scores(impl="eager"), given.trained
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_without_gradients(impl: str, mode):
    given = inputs(5, 7, 3)
    with mode(), budget(7, 2):
        scores = given.scores(impl=impl)
    assert not scores.requires_grad and scores.grad_fn is None
    torch.testing.assert_close(scores.clone(), slow_scores(given).detach())
    frozen = inputs(5, 7, 3, wanted=(False, False, False))
    assert not frozen.scores(impl=impl).requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_inside_activation_checkpointing(impl: str):
    given = inputs(5, 7, 3)
    with budget(7, 2):
        scores = torch.utils.checkpoint.checkpoint(lambda: given.scores(impl=impl), use_reentrant=False)
        got = with_grads(scores, given)
    for one, expected in zip(got, truth(given), strict=True):
        torch.testing.assert_close(one, expected)


# shapes, dtypes, layouts


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("t, v, d", list(product((0, 1, 3), (1, 2, 37), (1, 5))))
def test_awkward_shapes(impl: str, t: int, v: int, d: int):
    given = inputs(t, v, d)
    for options in OPTIONS.values():
        with budget(v, 2):
            got = with_grads(given.scores(impl=impl, **options), given)
        for one, expected in zip(got, truth(given, **options), strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-11, atol=1e-13)
        if v == 1:  # the one token there is has probability 1 whatever the weights
            assert all((one == 0).all() for one in got)


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_axes(impl: str):
    nothing = inputs(0, 1, 3)._replace(weight=torch.zeros(0, 3, dtype=torch.float64), bias=None)
    assert nothing.scores(impl=impl).shape == (0,)  # no vocabulary, and nothing to score
    no_width = inputs(3, 5, 1, bias=False)
    scores = token_log_probs(no_width.hidden[:, :0], no_width.weight[:, :0], no_width.targets, impl=impl)
    assert scores.tolist() == pytest.approx([-math.log(5)] * 3)  # all logits are 0


@pytest.mark.parametrize("impl", IMPLS)
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
    with budget(v, 2):
        scores = Inputs(grids[0].T, grids[1][:, ::2], grids[2][1::3], targets).scores(impl=impl)
        scores.backward(cotangent(t))
    expected = truth(plain)
    got = [scores.detach(), grids[0].grad.T, grids[1].grad[:, ::2], grids[2].grad[1::3]]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("impl", IMPLS)
def test_expanded_inputs(impl: str):
    # one row standing for all: its gradient is the sum; and the gradient that comes in is expanded as well
    row, one, targets = inputs(1, 1, 3).hidden, inputs(1, 1, 3).bias, torch.arange(5)
    weight = inputs(5, 5, 3).weight
    with budget(5, 2):
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


@pytest.mark.parametrize("impl", IMPLS)
def test_int32_targets(impl: str):
    given = inputs(7, 5, 3)
    narrow = given._replace(targets=given.targets.int())
    for parts in zip(
        with_grads(given.scores(impl=impl), given), with_grads(narrow.scores(impl=impl), narrow), strict=True
    ):
        assert torch.equal(*parts)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("narrow", ("hidden", "weight", "bias"))
def test_mixed_dtypes(impl: str, narrow: str):
    given = inputs(9, 7, 4, torch.float32)
    small = getattr(given, narrow).detach().bfloat16().requires_grad_()
    given = given._replace(**{narrow: small})
    with budget(7, 2):
        got = with_grads(given.scores(impl=impl), given)
    assert got[0].dtype == torch.float32  # computed in the wider of the two
    for x, one, expected in zip((got[0], *given.trained), got, truth(given), strict=True):
        assert one.dtype == x.dtype and error(one, expected) < 4 * torch.finfo(x.dtype).eps


@pytest.mark.parametrize("impl", IMPLS)
def test_an_integer_is_a_number(impl: str):  # as a model's config may hold it
    given = inputs(3, 5, 2)
    assert torch.equal(given.scores(impl=impl, softcap=30), given.scores(impl=impl, softcap=30.0))
    assert torch.equal(given.scores(impl=impl, logit_scale=2), given.scores(impl=impl, logit_scale=2.0))


def test_auto_is_bounded_in_memory():
    assert implementation("auto") is chunked.token_log_probs
    given = inputs(5, 7, 3)
    assert torch.equal(
        token_log_probs(*given[:2], given.targets, bias=given.bias), given.scores(impl="chunked")
    )


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
    for impl in IMPLS:
        with budget(67, 5), torch.autocast("cpu", dtype=torch.bfloat16):
            scores = given.scores(impl=impl)
            results[impl] = with_grads(scores, given) if backward_inside else None
        results[impl] = results[impl] or with_grads(scores, given)

    for x, fast, plain, true in zip((scores, *given.trained), *results.values(), expected, strict=True):
        assert fast.dtype == plain.dtype == x.dtype
        assert error(fast, true) < 1.5 * error(plain, true) < 0.02
        if dtype == torch.float32 and x is not given.bias:
            assert error(fast, true) > 1e-4  # the product is in bfloat16: autocast is respected
    assert scores.dtype == torch.float32


def test_gradients_of_float32_weights_under_autocast_are_summed_in_float32():
    given = inputs(1024, 31, 16, torch.float32)
    grad = 0.01 + cotangent(1024).abs()
    wide = in_float64(given)
    expected = torch.autograd.grad(slow_scores(wide), wide.trained, grad)
    with budget(1, 1), torch.autocast("cpu", dtype=torch.bfloat16):
        scores = given.scores(impl="chunked")
    for one, true in zip(torch.autograd.grad(scores, given.trained, grad.float()), expected, strict=True):
        assert one.dtype == torch.float32 and error(one, true) < 0.01


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_leaves_float64_alone(impl: str):
    given = inputs(5, 7, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (given.hidden @ given.weight.T).dtype == torch.float64  # as torch does
        scores = given.scores(impl=impl)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, slow_scores(given))


# extremes


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("size", (1e4, 1e6))
def test_large_logits(impl: str, dtype: torch.dtype, options: dict, size: float):
    given = inputs(11, 13, 6, dtype, scale=size)
    logits = given.hidden.double() @ given.weight.double().T
    assert logits.abs().max() > size
    with budget(13, 3):
        got = with_grads(given.scores(impl=impl, **options), given)
    assert all(one.isfinite().all() for one in got)
    assert (got[0] <= 0).all()
    assert error(got[0], truth(given, **options)[0]) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_certainty_and_impossibility(impl: str, dtype: torch.dtype):
    # logits (1e4, -1e4): log-probs 0 and -2e4, gradients 0 and (1, -1)
    hidden = torch.ones(2, 1, dtype=dtype, requires_grad=True)
    weight = torch.tensor([[1e4], [-1e4]]).to(dtype).requires_grad_()
    size = weight[0].item()
    for target, score, grads in ((0, 0.0, [0.0, 0.0]), (1, -2 * size, [-1.0, 1.0])):
        scores = token_log_probs(hidden, weight, torch.tensor([target] * 2), impl=impl)
        assert scores.tolist() == [score] * 2
        (grad,) = torch.autograd.grad(scores[0], weight)
        assert grad.flatten().tolist() == grads


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("logit_scale", (1.0, 0.5))
def test_tokens_ruled_out_by_a_bias(impl: str, logit_scale: float):
    # places of a padded vocabulary have a bias of -inf: probability 0, no gradient, nothing else disturbed
    given = inputs(9, 7, 3)
    kept = Inputs(given.hidden, given.weight, given.bias, given.targets % 5)
    with torch.no_grad():
        given.bias[5:] = -math.inf
    with budget(7, 2):
        got = with_grads(kept.scores(impl=impl, logit_scale=logit_scale), kept)
    few = Inputs(given.hidden, given.weight[:5].detach(), given.bias[:5].detach(), kept.targets)
    few.weight.requires_grad_()
    few.bias.requires_grad_()
    expected = with_grads(slow_scores(few, logit_scale), few)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one[: len(other)], other)
        assert (one[len(other) :] == 0).all()


# properties


@given(
    v=st.integers(1, 40),
    d=st.integers(1, 6),
    tokens=st.integers(1, 50),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0, 1e4]),
    dtype=st.sampled_from(DTYPES),
    softcap=st.sampled_from([None, 0.1, 5.0, 1e4]),
    impl=st.sampled_from(IMPLS),
    seed=st.integers(0, 99),
)
@FAST
def test_probabilities_of_the_vocabulary_sum_to_one(v, d, tokens, scale, dtype, softcap, impl, seed):
    if dtype == torch.float16:
        scale = min(scale, 30.0)  # its own range ends at 65504
    row = inputs(1, v, d, dtype, scale=scale, seed=seed)
    everything = Inputs(row.hidden.expand(v, d), row.weight, row.bias, torch.arange(v))
    with budget(v, tokens):
        scores = everything.scores(softcap=softcap, impl=impl)
    assert (scores <= 0).all()
    # logits up to 1e4 are told apart to 1e4 ulp, and so are their exponentials; the sum is of the same logits
    assert scores.detach().double().exp().sum().item() == pytest.approx(
        1.0, abs=2e-3 if scale == 1e4 else 1e-5
    )


@given(
    t=st.one_of(st.integers(0, 50), st.integers(0, 10**4)),
    v=st.integers(1, 2**18),
    room=st.one_of(st.integers(0, 2**12), st.integers(0, 2**32)),
    dtype=st.sampled_from(DTYPES),
    softcap=st.sampled_from([None, 30.0]),
)
@settings(FAST, max_examples=200)
def test_blocks_cover_every_token_once(t: int, v: int, room: int, dtype: torch.dtype, softcap: float | None):
    weight = torch.empty(v, 1, dtype=dtype, device="meta")
    with patch.object(chunked, "BLOCK_BYTES", room):
        blocks = list(chunked.Head(weight, None, 1.0, softcap, dtype).blocks(t))
    assert [k for part in blocks for k in range(part.start, part.stop)] == list(range(t))

    sizes = [part.stop - part.start for part in blocks]
    assert all(size > 0 for size in sizes)
    wide = accumulation_dtype(dtype).itemsize
    logits = v * (wide + (dtype.itemsize if dtype.itemsize < wide else 0) + (wide if softcap else 0))
    assert all(size * logits <= room or size == 1 for size in sizes)
    if sizes:  # no more blocks than the budget asks for, and as even as they can be
        fewest = -(-t // max(1, room // logits))
        assert len(sizes) <= fewest
        assert set(sizes[:-1]) <= {-(-t // fewest)} and sizes[-1] <= sizes[0]


def test_log_probs_from_logits():
    # p = (1/2, 1/4, 1/4)
    logits = torch.tensor([[2.0, 1.0, 1.0]] * 2).half() * math.log(2)
    scores = log_probs_from_logits(logits, torch.tensor([0, 2]))
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([math.log(1 / 2), math.log(1 / 4)], abs=1e-3)
    assert log_probs_from_logits(logits.double(), torch.tensor([0, 2])).dtype == torch.float64


# refusals

H, W, T = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 1, 4])
REFUSED = {
    "hidden-3d": (
        ValueError,
        {"hidden": H[None]},
        "hidden should have 2 dimensions, but its shape is (1, 3, 4).",
    ),
    "hidden-1d": (ValueError, {"hidden": H[0]}, "hidden should have 2 dimensions, but its shape is (4,)."),
    "weight-1d": (ValueError, {"weight": W[0]}, "weight should have 2 dimensions, but its shape is (4,)."),
    "targets-2d": (
        ValueError,
        {"targets": T[None]},
        "targets should have 1 dimensions, but its shape is (1, 3).",
    ),
    "targets-0d": (ValueError, {"targets": T[0]}, "targets should have 1 dimensions, but its shape is ()."),
    "weight-device": (
        ValueError,
        {"weight": W.to("meta")},
        "weight is on meta but hidden is on cpu: move one of them.",
    ),
    "targets-device": (
        ValueError,
        {"targets": T.to("meta")},
        "targets is on meta but hidden is on cpu: move one of them.",
    ),
    "hidden-int": (
        TypeError,
        {"hidden": H.long()},
        "hidden and weight should be floats, but they are torch.int64 and torch.float32.",
    ),
    "weight-int": (
        TypeError,
        {"weight": W.int()},
        "hidden and weight should be floats, but they are torch.float32 and torch.int32.",
    ),
    "targets-float": (
        TypeError,
        {"targets": T.float()},
        "targets should be token ids (int64), but they are torch.float32.",
    ),
    "targets-bool": (
        TypeError,
        {"targets": T.bool()},
        "targets should be token ids (int64), but they are torch.bool.",
    ),
    "widths": (ValueError, {"weight": W[:, :3]}, "hidden is 4 wide but weight is 3 wide."),
    "lengths": (ValueError, {"targets": T[:2]}, "there are 3 hidden states but 2 targets."),
    "no-targets": (ValueError, {"targets": T[:0]}, "there are 3 hidden states but 0 targets."),
    "bias-length": (
        ValueError,
        {"bias": torch.zeros(4)},
        "bias should have shape (5,), but its shape is (4,).",
    ),
    "bias-one": (ValueError, {"bias": torch.zeros(1)}, "bias should have shape (5,), but its shape is (1,)."),
    "bias-2d": (
        ValueError,
        {"bias": torch.zeros(5, 1)},
        "bias should have shape (5,), but its shape is (5, 1).",
    ),
    "softcap-zero": (ValueError, {"softcap": 0.0}, "softcap should be positive, but it is 0.0."),
    "softcap-negative": (ValueError, {"softcap": -30.0}, "softcap should be positive, but it is -30.0."),
    "softcap-nan": (ValueError, {"softcap": math.nan}, "softcap should be positive, but it is nan."),
    "target-high": (ValueError, {"targets": T + 1}, "targets should be in [0, 5), but one is 5."),
    "target-low": (ValueError, {"targets": T - 1}, "targets should be in [0, 5), but one is -1."),
    "target-ignored": (  # the -100 that other libraries skip
        ValueError,
        {"targets": torch.tensor([0, -100, 1])},
        "targets should be in [0, 5), but one is -100.",
    ),
    "no-vocabulary": (ValueError, {"weight": W[:0]}, "targets should be in [0, 0), but one is 0."),
    "impl-unknown": (
        ValueError,
        {"impl": "fast"},
        "impl should be one of auto, triton, chunked, eager, but it is 'fast'.",
    ),
    "impl-none": (
        ValueError,
        {"impl": None},
        "impl should be one of auto, triton, chunked, eager, but it is None.",
    ),
    "impl-unavailable": (
        ValueError,
        {"impl": "triton"},
        "impl = 'triton' is not available in this version: use 'auto' or 'chunked'.",
    ),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind, change, message", REFUSED.values(), ids=REFUSED)
def test_refusals(impl: str, kind: type[Exception], change: dict, message: str):
    with pytest.raises(kind) as caught:
        token_log_probs(**{"hidden": H, "weight": W, "targets": T, "impl": impl} | change)
    assert str(caught.value) == message


TO_BE_REFUSED = {
    "bias-int": (TypeError, {"bias": torch.zeros(5, dtype=torch.long)}),
    "bias-device": (ValueError, {"bias": torch.zeros(5, device="meta")}),
    "softcap-inf": (ValueError, {"softcap": math.inf}),
    "scale-nan": (ValueError, {"logit_scale": math.nan}),
    "scale-inf": (ValueError, {"logit_scale": math.inf}),
}


@pytest.mark.parametrize("kind, change", TO_BE_REFUSED.values(), ids=TO_BE_REFUSED)
def test_refusals_that_are_missing(kind: type[Exception], change: dict):
    with pytest.raises(kind, match=next(iter(change))) as caught:
        token_log_probs(H, W, T, **change)
    assert "\n" not in str(caught.value)


# memory


def measured(impl: str, t: int, d: int, v: int) -> int:
    """Bytes that forward and backward need beyond their inputs, in a process of its own."""
    command = [sys.executable, str(HERE / "memory_of_log_probs.py"), impl, str(t), str(d), str(v)]
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["extra"]


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_memory_of_chunked():
    extra = measured("chunked", 4096, 512, 65536)
    assert 100 * MEGABYTE < extra < 600 * MEGABYTE  # the gradient of the weight alone is 134 MB


@linux
def test_memory_of_eager():
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if pages < 6000 * MEGABYTE:
        pytest.skip("needs 6 GB of free memory")
    assert measured("eager", 4096, 512, 65536) > 3000 * MEGABYTE


@linux
def test_memory_of_chunked_is_gradients_and_blocks():
    t, d, v = 8192, 64, 16384  # eight blocks; all the logits would be 512 MiB
    extra = measured("chunked", t, d, v)
    gradients = (t * d + v * d) * 4
    assert extra < gradients + 2.5 * chunked.BLOCK_BYTES
