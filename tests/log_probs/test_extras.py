"""The extras of `token_log_probs`, against the same from float64 logits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_wrapper import token_log_probs
from dpo_wrapper.log_probs import EXTRAS
from helpers.log_prob_inputs import (
    FAST,
    OPTIONS,
    Inputs,
    in_float64,
    random_inputs,
    relative_error,
    slow_extras,
    slow_scores,
    tile_size,
    values_and_grads,
)

CONTINUOUS = [name for name in EXTRAS if name != "top1"]


def test_extras_by_hand(impl: str):
    # p = (1/2, 1/4, 1/4): entropy 1.5 ln 2, Σ p² = 3/8
    weight = torch.tensor([[1.0], [0.0], [0.0]]) * math.log(2)
    with tile_size(2, 1):
        scores, extras = token_log_probs(
            torch.ones(3, 1), weight, torch.arange(3), impl=impl, extras=["greedy", "top1", *EXTRAS[:2]]
        )
    assert list(extras) == ["greedy", "top1", "entropy", "log_sum_p2"]
    assert scores.tolist() == pytest.approx([-math.log(2), -math.log(4), -math.log(4)], abs=1e-6)
    assert extras["entropy"].tolist() == pytest.approx([1.5 * math.log(2)] * 3, abs=1e-6)
    assert extras["log_sum_p2"].tolist() == pytest.approx([math.log(3 / 8)] * 3, abs=1e-6)
    assert extras["greedy"].tolist() == pytest.approx([-math.log(2)] * 3, abs=1e-6)
    assert extras["top1"].tolist() == [True, False, False] and extras["top1"].dtype == torch.bool


@pytest.mark.parametrize("scale", (0.1, 2.0, 30.0, 1e3))  # with the last two, p of one entry is nearly 1
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_extras_in_float64(impl: str, options: dict, scale: float):
    inputs = random_inputs(61, 23, 7, scale=scale)
    expected = slow_extras(inputs, **options)
    if scale == 1e3 and "softcap" not in options:
        assert expected["entropy"].median() < 1e-6
    with tile_size(17, 5):
        _, extras = inputs.scores(impl=impl, extras=EXTRAS, **options)
    assert torch.equal(extras["top1"], expected["top1"])
    assert 0 < expected["top1"].sum() < 61
    for name in CONTINUOUS:
        assert extras[name].dtype == torch.float64
        torch.testing.assert_close(extras[name], expected[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_extras_are_as_exact_as_those_of_eager(dtype: torch.dtype, options: dict):
    inputs = random_inputs(83, 131, 24, dtype, scale=2.0)
    expected = slow_extras(inputs, **options)
    _, eager = inputs.scores(impl="eager", extras=EXTRAS, **options)
    with tile_size(19, 37):
        _, fast = inputs.scores(impl="chunked", extras=EXTRAS, **options)
    for name in CONTINUOUS:
        assert eager[name].dtype == fast[name].dtype == torch.float32
        plain = relative_error(eager[name], expected[name])
        assert plain < 4 * torch.finfo(dtype).eps
        assert relative_error(fast[name], expected[name]) < max(2 * plain, 5e-7)
    assert torch.equal(fast["top1"], eager["top1"])


@given(
    v=st.integers(1, 9),
    entries=st.integers(1, 9),
    impl=st.sampled_from(("chunked", "eager")),
    scale=st.sampled_from([0.0, 1.0, 100.0]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@FAST
def test_the_size_of_tiles_changes_no_extras(v, entries, impl, scale, bias, seed):
    inputs = random_inputs(5, v, 3, scale=scale, bias=bias, seed=seed)
    with tile_size(2, entries), torch.no_grad():
        _, extras = inputs.scores(impl=impl, extras=EXTRAS)
    expected = slow_extras(inputs)
    for name in EXTRAS:  # with a scale of 0 all logits of equal bias are highest
        torch.testing.assert_close(extras[name], expected[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_top1_compares_logits(impl: str, dtype: torch.dtype):
    # every entry is the target once: one of them is likeliest however its log-prob is rounded
    row = random_inputs(1, 997, 8, dtype, seed=3)
    for seed in range(5):
        hidden = random_inputs(1, 1, 8, dtype, seed=seed).hidden.detach().expand(997, 8)
        everything = Inputs(hidden, row.weight, row.bias, torch.arange(997))
        with tile_size(500, 100):
            scores, extras = everything.scores(impl=impl, extras=["top1", "greedy"])
        likeliest = extras["top1"].nonzero()[:, 0]
        assert len(likeliest) >= 1 and torch.equal(scores[likeliest], scores.max().expand(len(likeliest)))
        torch.testing.assert_close(extras["greedy"], scores.detach().max().expand(997), rtol=0, atol=1e-6)
        assert (extras["greedy"] >= scores - 1e-6).all() and (extras["greedy"] <= 0).all()


def test_entries_with_probability_0_do_not_count(impl: str):
    inputs = random_inputs(9, 7, 3)
    masked = Inputs(*(x.detach() for x in inputs[:3]), inputs.targets % 5)
    masked.bias[5:] = -math.inf
    few = Inputs(masked.hidden, masked.weight[:5], masked.bias[:5], masked.targets)
    with tile_size(2, 1):
        _, extras = masked.scores(impl=impl, extras=EXTRAS)
    for name, expected in slow_extras(few).items():
        torch.testing.assert_close(extras[name], expected)


@pytest.mark.parametrize("needs_grad", ((True, True, True), (True, False, False)), ids=("trained", "frozen"))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_extras_change_no_bit_and_have_no_gradient(impl: str, options: dict, needs_grad: tuple):
    inputs = random_inputs(11, 13, 5, torch.float32, needs_grad=needs_grad)
    with tile_size(4, 3, entry_bytes=4):
        plain = values_and_grads(inputs.scores(impl=impl, **options), inputs)
        scores, extras = inputs.scores(impl=impl, extras=EXTRAS, **options)
        with_extras = values_and_grads(scores, inputs)
    assert all(torch.equal(*pair) for pair in zip(plain, with_extras, strict=True))
    assert not any(x.requires_grad for x in extras.values())


def test_extras_of_no_token_and_no_extras(impl: str):
    inputs = random_inputs(0, 5, 3)
    scores, extras = inputs.scores(impl=impl, extras=["entropy", "top1"])
    assert scores.shape == extras["entropy"].shape == extras["top1"].shape == (0,)
    assert torch.equal(
        random_inputs(3, 5, 3).scores(impl=impl, extras=()), random_inputs(3, 5, 3).scores(impl=impl)
    )


def test_extras_with_autocast(impl: str):
    inputs = random_inputs(9, 7, 4, torch.float32, needs_grad=(False,) * 3)
    with torch.autocast("cpu", dtype=torch.bfloat16), tile_size(4, 3):
        scores, extras = inputs.scores(impl=impl, extras=EXTRAS)
    torch.testing.assert_close(scores.double(), slow_scores(in_float64(inputs)), rtol=0.05, atol=0.05)
    for name in CONTINUOUS:
        torch.testing.assert_close(extras[name].double(), slow_extras(inputs)[name], rtol=0.05, atol=0.05)
