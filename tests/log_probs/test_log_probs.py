"""`token_log_probs` against the slow lines of its docstring in float64: values and gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_wrapper import token_log_probs
from dpo_wrapper.log_probs import accumulation_dtype
from dpo_wrapper.log_probs.tiles import even_slices
from helpers.log_prob_inputs import (
    DTYPES,
    FAST,
    OPTIONS,
    Inputs,
    cotangent,
    in_float64,
    random_inputs,
    relative_error,
    slow_scores,
    softmax_caching,
    tile_size,
    truth,
    values_and_grads,
)

# numbers by hand


@pytest.mark.parametrize("impl", ("auto", "chunked", "eager"))
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


MODES = {
    "trained": (True, True, True),
    "frozen": (True, False, False),  # forward computes the gradient
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no-bias"))
@pytest.mark.parametrize("needs_grad", MODES.values(), ids=MODES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_error_is_that_of_eager_in_the_same_dtype(
    dtype: torch.dtype, bias: bool, needs_grad: tuple[bool, bool, bool], options: dict
):
    inputs = random_inputs(
        83, 131, 24, dtype, bias=bias, needs_grad=(*needs_grad[:2], needs_grad[2] and bias), scale=2.0
    )
    expected = truth(inputs, **options)
    eager = values_and_grads(inputs.scores(impl="eager", **options), inputs)
    fast = []
    for is_cached in (True, False):
        with softmax_caching(is_cached):
            fast.append(values_and_grads(inputs.scores(impl="chunked", **options), inputs))
            with tile_size(19, 37):  # slices of 17 tokens and one of 15, of 33 entries and one of 32
                fast.append(values_and_grads(inputs.scores(impl="chunked", **options), inputs))

    eps = torch.finfo(dtype).eps
    for true, plain, *others in zip(expected, eager, *fast, strict=True):
        assert relative_error(plain, true) < 8 * eps
        # the reference has float64 errors itself; eager's bias gradient is a pairwise sum in float32
        max_error = 8 * eps if dtype == torch.float64 else max(2 * relative_error(plain, true), 5e-7)
        assert all(relative_error(one, true) < max_error for one in others)
        assert all(one.dtype == plain.dtype for one in others)
    assert eager[0].dtype == accumulation_dtype(dtype)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_all_but_the_products_is_in_float32(impl: str, dtype: torch.dtype):
    # the products 1 and 2 are exact in any dtype, what follows is not: 0.3 (1 + 3/256), and tanh of it
    hidden, weight = torch.ones(2, 1, dtype=dtype), torch.tensor([[1.0], [2.0]]).to(dtype)
    inputs = Inputs(hidden, weight, torch.tensor([3 / 256, 0.0]).to(dtype), torch.tensor([0, 1]))
    for options in ({}, {"logit_scale": 0.3}, {"softcap": 0.7}, {"logit_scale": 0.3, "softcap": 0.7}):
        scores = inputs.scores(impl=impl, **options)
        torch.testing.assert_close(scores, slow_scores(in_float64(inputs), **options).float())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_many_tiles_lose_no_precision(dtype: torch.dtype, tiled_impl: str):
    # 1024 rows of tiles of one token. A running sum in bfloat16 stops growing where a term is 1/256 of it.
    inputs = random_inputs(1024, 31, 16, dtype)
    grad = 0.01 + cotangent(1024).abs()  # all of one sign, as in an SFT term: the sums grow
    wide = in_float64(inputs)
    expected = torch.autograd.grad(slow_scores(wide), wide.trained, grad)
    one = torch.autograd.grad(inputs.scores(impl=tiled_impl), inputs.trained, grad.float())
    with tile_size(1, 3):
        scores = inputs.scores(impl=tiled_impl)
        many = torch.autograd.grad(scores, inputs.trained, grad.float())
    for tiled, plain, true in zip(many, one, expected, strict=True):
        assert relative_error(tiled, true) < 1.4 * relative_error(plain, true)

    # a sum in the narrow dtype would fail this test
    p = (wide.hidden @ wide.weight.T + wide.bias).softmax(-1)
    d_logits = grad[:, None] * (torch.nn.functional.one_hot(inputs.targets, 31) - p)
    narrow_sum = torch.zeros(31, dtype=dtype)
    for row in d_logits:
        narrow_sum += row.to(dtype)
    assert relative_error(narrow_sum, expected[2]) > 4 * relative_error(many[2], expected[2])


@given(
    t=st.integers(1, 9),
    v=st.integers(1, 12),
    tokens=st.integers(1, 10),
    entries=st.integers(0, 13),
    softcap=st.sampled_from([None, 1.5]),
    is_cached=st.booleans(),
    is_frozen=st.booleans(),
    seed=st.integers(0, 99),
)
@FAST
def test_the_size_of_tiles_changes_nothing(t, v, tokens, entries, softcap, is_cached, is_frozen, seed):
    inputs = random_inputs(t, v, 3, needs_grad=(True, not is_frozen, not is_frozen), seed=seed)
    with tile_size(tokens, entries), softmax_caching(is_cached):
        scores = values_and_grads(inputs.scores(impl="chunked", softcap=softcap), inputs)
    for got, expected in zip(scores, truth(inputs, softcap=softcap), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@given(
    n=st.one_of(st.integers(0, 50), st.integers(0, 2**14)),
    max_size=st.one_of(st.integers(0, 50), st.integers(0, 2**14)),
    multiple=st.sampled_from([1, 64]),
)
@settings(FAST, max_examples=200)
def test_even_slices_cover_the_range_once(n: int, max_size: int, multiple: int):
    slices = list(even_slices(n, max_size, multiple))
    assert [s.start for s in slices] + [n] == [0] + [s.stop for s in slices]
    sizes = [s.stop - s.start for s in slices]
    assert all(size > 0 for size in sizes)
    # the fewest that suffice, as even as can be, and then rounded up to the multiple
    even = -(-n // max(1, -(-n // max(1, max_size))))
    assert all(size == -(-even // multiple) * multiple for size in sizes[:-1])
    assert all(size <= max(1, max_size) or multiple > 1 for size in sizes)


# extremes


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("size", (1e4, 1e6))
def test_large_logits(impl: str, dtype: torch.dtype, options: dict, size: float):
    inputs = random_inputs(11, 13, 6, dtype, scale=size)
    logits = inputs.hidden.double() @ inputs.weight.double().T
    assert logits.abs().max() > size
    with tile_size(2, 3):
        got = values_and_grads(inputs.scores(impl=impl, **options), inputs)
    assert all(one.isfinite().all() for one in got)
    assert (got[0] <= 0).all()
    assert relative_error(got[0], truth(inputs, **options)[0]) < 4 * torch.finfo(dtype).eps


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


def test_log_probs_near_0_are_exact(impl: str):
    # the other entry's logit is -x: log p = -log(1 + e^-x), about -e^-x, which float32 logits determine
    x = torch.tensor([1.0, 10.0, 20.0, 40.0, 80.0])
    inputs = Inputs(-x[:, None], torch.tensor([[0.0], [1.0]]), None, torch.zeros(5, dtype=torch.long))
    inputs.hidden.requires_grad_()
    inputs.weight.requires_grad_()
    with tile_size(2, 1):
        got = values_and_grads(inputs.scores(impl=impl), inputs)
    # d log p / d logits is ±p of the other entry, e^-x / (1 + e^-x); hidden is -x, the weights are 0 and 1
    x = x.double()
    scores, other = -torch.log1p(torch.exp(-x)), torch.sigmoid(-x)
    weight_grad = (cotangent(5) * other * -x).sum()
    expected = [scores, -(cotangent(5) * other)[:, None], torch.stack([weight_grad, -weight_grad])[:, None]]
    for one, true in zip(got, expected, strict=True):
        # eager rounds at 1: no better than 1e-7
        exact = {"rtol": 3e-6, "atol": 0.0} if impl == "chunked" else {"rtol": 1e-5, "atol": 2e-7}
        torch.testing.assert_close(one.double(), true, **exact)


@pytest.mark.parametrize("logit_scale", (1.0, 0.5))
def test_entries_with_a_bias_of_minus_infinity(impl: str, logit_scale: float):
    # padding of the vocabulary may have a bias of -inf: probability 0, no gradient, no effect on others
    inputs = random_inputs(9, 7, 3)
    masked = Inputs(inputs.hidden, inputs.weight, inputs.bias, inputs.targets % 5)
    with torch.no_grad():
        inputs.bias[5:] = -math.inf
    with tile_size(2, 3):
        got = values_and_grads(masked.scores(impl=impl, logit_scale=logit_scale), masked)
    few = Inputs(inputs.hidden, inputs.weight[:5].detach(), inputs.bias[:5].detach(), masked.targets)
    few.weight.requires_grad_()
    few.bias.requires_grad_()
    expected = values_and_grads(slow_scores(few, logit_scale), few)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one[: len(other)], other)
        assert (one[len(other) :] == 0).all()


def test_a_tile_of_the_target_and_an_entry_with_probability_0(impl: str):
    # three tiles of two entries: the target and one of probability 0; two of probability 0; two others
    for is_frozen in (False, True):
        inputs = random_inputs(4, 6, 3, needs_grad=(True, not is_frozen, False))
        inputs = inputs._replace(targets=torch.zeros(4, dtype=torch.long))
        inputs.bias[1:4] = -math.inf
        with tile_size(2, 2):
            got = values_and_grads(inputs.scores(impl=impl), inputs)
        few = [0, 4, 5]
        weight = inputs.weight.detach()[few].requires_grad_(not is_frozen)
        expected = truth(Inputs(inputs.hidden, weight, inputs.bias[few], inputs.targets))
        got = [one[few] if one.shape == (6, 3) else one for one in got]
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)


# properties


@given(
    v=st.integers(1, 40),
    d=st.integers(1, 6),
    tokens=st.integers(1, 50),
    entries=st.integers(1, 50),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0, 1e4]),
    dtype=st.sampled_from(DTYPES),
    softcap=st.sampled_from([None, 0.1, 5.0, 1e4]),
    impl=st.sampled_from(("chunked", "eager")),
    seed=st.integers(0, 99),
)
@FAST
def test_probabilities_of_the_vocabulary_sum_to_one(v, d, tokens, entries, scale, dtype, softcap, impl, seed):
    if dtype == torch.float16:
        scale = min(scale, 30.0)  # its own range ends at 65504
    row = random_inputs(1, v, d, dtype, scale=scale, seed=seed)
    everything = Inputs(row.hidden.expand(v, d), row.weight, row.bias, torch.arange(v))
    with tile_size(tokens, entries):
        scores = everything.scores(softcap=softcap, impl=impl)
    assert (scores <= 0).all()
    # the rounding of a logit of 1e4 is a relative error of 1e4 ulp in its exponential
    assert scores.detach().double().exp().sum().item() == pytest.approx(
        1.0, abs=2e-3 if scale == 1e4 else 1e-5
    )
