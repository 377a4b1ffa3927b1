"""`token_log_probs` against the slow lines of its docstring in float64: values and gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_wrapper import token_log_probs
from dpo_wrapper.log_probs import accumulation_dtype
from dpo_wrapper.log_probs.tiles import spans
from helpers.log_prob_inputs import (
    DTYPES,
    FAST,
    OPTIONS,
    Inputs,
    cotangent,
    error,
    in_float64,
    inputs,
    keeps,
    slow_scores,
    tiles,
    truth,
    with_grads,
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


WAYS = {
    "trained": (True, True, True),
    "frozen": (True, False, False),  # the gradient is ready in forward
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no-bias"))
@pytest.mark.parametrize("wanted", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_error_is_that_of_the_plain_lines_in_the_same_dtype(
    dtype: torch.dtype, bias: bool, wanted: tuple[bool, bool, bool], options: dict
):
    given = inputs(83, 131, 24, dtype, bias=bias, wanted=(*wanted[:2], wanted[2] and bias), scale=2.0)
    expected = truth(given, **options)
    eager = with_grads(given.scores(impl="eager", **options), given)
    fast = []
    for kept in (True, False):
        with keeps(kept):
            fast.append(with_grads(given.scores(impl="chunked", **options), given))
            with tiles(19, 37):  # tiles of 17 tokens and one of 15, of 33 words and one of 32, or more
                fast.append(with_grads(given.scores(impl="chunked", **options), given))

    eps = torch.finfo(dtype).eps
    for true, plain, *others in zip(expected, eager, *fast, strict=True):
        assert error(plain, true) < 8 * eps
        # the truth is no truer than float64 itself; eager's sum for the bias is of pairs, in float32
        most = 8 * eps if dtype == torch.float64 else max(2 * error(plain, true), 5e-7)
        assert all(error(one, true) < most for one in others)
        assert all(one.dtype == plain.dtype for one in others)
    assert eager[0].dtype == accumulation_dtype(dtype)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_after_the_product_all_is_in_float32(impl: str, dtype: torch.dtype):
    # the products 1 and 2 are exact in any dtype, what follows is not: 0.3 (1 + 3/256), and tanh of it
    hidden, weight = torch.ones(2, 1, dtype=dtype), torch.tensor([[1.0], [2.0]]).to(dtype)
    given = Inputs(hidden, weight, torch.tensor([3 / 256, 0.0]).to(dtype), torch.tensor([0, 1]))
    for options in ({}, {"logit_scale": 0.3}, {"softcap": 0.7}, {"logit_scale": 0.3, "softcap": 0.7}):
        scores = given.scores(impl=impl, **options)
        torch.testing.assert_close(scores, slow_scores(in_float64(given), **options).float())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_many_tiles_lose_no_precision(dtype: torch.dtype, chunked_impl: str):
    # 1024 rows of tiles of one token. A running sum in bfloat16 stops growing where a term is 1/256 of it.
    given = inputs(1024, 31, 16, dtype)
    grad = 0.01 + cotangent(1024).abs()  # all of one sign, as in an SFT term: the sums grow
    wide = in_float64(given)
    expected = torch.autograd.grad(slow_scores(wide), wide.trained, grad)
    one = torch.autograd.grad(given.scores(impl=chunked_impl), given.trained, grad.float())
    with tiles(1, 3):
        scores = given.scores(impl=chunked_impl)
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
    rows=st.integers(1, 10),
    words=st.integers(0, 13),
    softcap=st.sampled_from([None, 1.5]),
    kept=st.booleans(),
    frozen=st.booleans(),
    seed=st.integers(0, 99),
)
@FAST
def test_the_size_of_tiles_changes_nothing(t, v, rows, words, softcap, kept, frozen, seed):
    given = inputs(t, v, 3, wanted=(True, not frozen, not frozen), seed=seed)
    with tiles(rows, words), keeps(kept):
        scores = with_grads(given.scores(impl="chunked", softcap=softcap), given)
    for got, expected in zip(scores, truth(given, softcap=softcap), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@given(
    n=st.one_of(st.integers(0, 50), st.integers(0, 2**18)),
    most=st.one_of(st.integers(0, 50), st.integers(0, 2**18)),
    multiple=st.sampled_from([1, 64]),
)
@settings(FAST, max_examples=200)
def test_spans_cover_everything_once(n: int, most: int, multiple: int):
    parts = list(spans(n, most, multiple))
    assert [k for part in parts for k in range(part.start, part.stop)] == list(range(n))
    sizes = [part.stop - part.start for part in parts]
    assert all(size > 0 for size in sizes)
    # no more than are needed, as even as they can be, and then rounded up to the multiple
    even = -(-n // max(1, -(-n // max(1, most))))
    assert all(size == -(-even // multiple) * multiple for size in sizes[:-1])
    assert all(size <= max(1, most) or multiple > 1 for size in sizes)


# extremes


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("size", (1e4, 1e6))
def test_large_logits(impl: str, dtype: torch.dtype, options: dict, size: float):
    given = inputs(11, 13, 6, dtype, scale=size)
    logits = given.hidden.double() @ given.weight.double().T
    assert logits.abs().max() > size
    with tiles(2, 3):
        got = with_grads(given.scores(impl=impl, **options), given)
    assert all(one.isfinite().all() for one in got)
    assert (got[0] <= 0).all()
    assert error(got[0], truth(given, **options)[0]) < 4 * torch.finfo(dtype).eps


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
    # the other word's logit is -x: log p = -log(1 + e^-x), about -e^-x, of which float32 logits know all
    x = torch.tensor([1.0, 10.0, 20.0, 40.0, 80.0])
    given = Inputs(-x[:, None], torch.tensor([[0.0], [1.0]]), None, torch.zeros(5, dtype=torch.long))
    given.hidden.requires_grad_()
    given.weight.requires_grad_()
    with tiles(2, 1):
        got = with_grads(given.scores(impl=impl), given)
    # d log p / d logits is ±p of the other word, e^-x / (1 + e^-x); hidden is -x, the weights are 0 and 1
    x = x.double()
    scores, other = -torch.log1p(torch.exp(-x)), torch.sigmoid(-x)
    of_weight = (cotangent(5) * other * -x).sum()
    expected = [scores, -(cotangent(5) * other)[:, None], torch.stack([of_weight, -of_weight])[:, None]]
    for one, true in zip(got, expected, strict=True):
        # eager rounds at 1: no better than 1e-7
        exact = {"rtol": 3e-6, "atol": 0.0} if impl == "chunked" else {"rtol": 1e-5, "atol": 2e-7}
        torch.testing.assert_close(one.double(), true, **exact)


@pytest.mark.parametrize("logit_scale", (1.0, 0.5))
def test_tokens_ruled_out_by_a_bias(impl: str, logit_scale: float):
    # places of a padded vocabulary have a bias of -inf: probability 0, no gradient, nothing else disturbed
    given = inputs(9, 7, 3)
    kept = Inputs(given.hidden, given.weight, given.bias, given.targets % 5)
    with torch.no_grad():
        given.bias[5:] = -math.inf
    with tiles(2, 3):
        got = with_grads(kept.scores(impl=impl, logit_scale=logit_scale), kept)
    few = Inputs(given.hidden, given.weight[:5].detach(), given.bias[:5].detach(), kept.targets)
    few.weight.requires_grad_()
    few.bias.requires_grad_()
    expected = with_grads(slow_scores(few, logit_scale), few)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one[: len(other)], other)
        assert (one[len(other) :] == 0).all()


def test_a_tile_of_nothing_but_the_target_and_words_ruled_out(impl: str):
    # three tiles of two words: the target beside a word of probability 0, two such words, and two others
    for frozen in (False, True):
        given = inputs(4, 6, 3, wanted=(True, not frozen, False))
        given = given._replace(targets=torch.zeros(4, dtype=torch.long))
        given.bias[1:4] = -math.inf
        with tiles(2, 2):
            got = with_grads(given.scores(impl=impl), given)
        few = [0, 4, 5]
        weight = given.weight.detach()[few].requires_grad_(not frozen)
        expected = truth(Inputs(given.hidden, weight, given.bias[few], given.targets))
        got = [one[few] if one.shape == (6, 3) else one for one in got]
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)


# properties


@given(
    v=st.integers(1, 40),
    d=st.integers(1, 6),
    rows=st.integers(1, 50),
    words=st.integers(1, 50),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0, 1e4]),
    dtype=st.sampled_from(DTYPES),
    softcap=st.sampled_from([None, 0.1, 5.0, 1e4]),
    impl=st.sampled_from(("chunked", "eager")),
    seed=st.integers(0, 99),
)
@FAST
def test_probabilities_of_the_vocabulary_sum_to_one(v, d, rows, words, scale, dtype, softcap, impl, seed):
    if dtype == torch.float16:
        scale = min(scale, 30.0)  # its own range ends at 65504
    row = inputs(1, v, d, dtype, scale=scale, seed=seed)
    everything = Inputs(row.hidden.expand(v, d), row.weight, row.bias, torch.arange(v))
    with tiles(rows, words):
        scores = everything.scores(softcap=softcap, impl=impl)
    assert (scores <= 0).all()
    # logits up to 1e4 are told apart to 1e4 ulp, and so are their exponentials; the sum is of the same logits
    assert scores.detach().double().exp().sum().item() == pytest.approx(
        1.0, abs=2e-3 if scale == 1e4 else 1e-5
    )
