"""Gradients that `token_log_probs` computes in forward, with `fused_loss=`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dpo_wrapper.log_probs import FusedLoss, fused_backward
from helpers.log_prob_inputs import (
    DTYPES,
    FAST,
    NEEDS_GRAD,
    OPTIONS,
    Inputs,
    cache_budget,
    chunk_size,
    cotangent,
    random_inputs,
    relative_error,
    tile_size,
    truth,
    values_and_grads,
    weighted_sum,
)
from helpers.marks import mark_slow_except

T, V, D = 12, 45, 6
GROUPS = torch.tensor([0, 0, 1, 1, 2, 2, 2, 0, 3, 3, 3, 3])
# under a frozen head, forward computes the gradient without a loss
TRAINED = [needs_grad for needs_grad in NEEDS_GRAD if needs_grad[1] or needs_grad[2]]


def fail_if_called(*args, **kwargs):
    raise AssertionError("gradients were computed again")


@pytest.mark.parametrize("tokens", mark_slow_except((5,), (1, 5, 99)))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("needs_grad", TRAINED, ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_predicted_gradients_are_not_recomputed(
    dtype: torch.dtype, needs_grad: tuple, options: dict, tokens: int, monkeypatch
):
    monkeypatch.setattr(fused_backward, "gradients_from_saved", fail_if_called)
    inputs = random_inputs(T, V, D, dtype, needs_grad=needs_grad)
    plain = values_and_grads(inputs.scores(impl="eager", **options), inputs)
    expected = truth(inputs, **options)
    for scale in (1.0, -0.5, 65536.0):  # of a scaler, or the share of a micro-batch

        def loss(scores: Tensor, scale: float = scale) -> Tensor:
            return weighted_sum(scores) * scale

        with tile_size(3, 8), chunk_size(tokens):
            results = values_and_grads(
                inputs.scores(impl="chunked", fused_loss=FusedLoss(loss, GROUPS), **options), inputs
            )
        for one, eager, true in zip(results, plain, expected, strict=True):
            assert one.dtype == eager.dtype
            assert relative_error(one, true) <= max(
                3 * relative_error(eager, true), 3 * torch.finfo(dtype).eps
            )


@pytest.mark.parametrize("tokens", (1, 99))
@pytest.mark.parametrize("needs_grad", TRAINED, ids=str)
def test_other_gradients_are_recomputed(needs_grad: tuple, tokens: int):
    inputs = random_inputs(T, V, D, needs_grad=needs_grad)
    losses = {
        "another function": lambda scores: scores.square().sum(),
        "independent of the scores": lambda scores: torch.ones((), requires_grad=True) * 2,
        "without a gradient": lambda scores: scores.detach().sum(),
        "one score twice": lambda scores: weighted_sum(scores)[None].sum() - scores[3],
        "not a number": lambda scores: (scores * torch.nan).sum(),
        "across groups": lambda scores: weighted_sum(scores) * scores.sum().detach().exp(),
    }
    for name, loss in losses.items():
        with tile_size(3, 8), chunk_size(tokens):
            results = values_and_grads(
                inputs.scores(impl="chunked", fused_loss=FusedLoss(loss, GROUPS)), inputs
            )
        for one, true in zip(results, truth(inputs), strict=True):
            torch.testing.assert_close(one, true, msg=name)


def test_gradients_of_zero():
    inputs = random_inputs(T, V, D)
    scores = inputs.scores(impl="chunked", fused_loss=FusedLoss(lambda scores: (scores * 0.0).sum()))
    results = torch.autograd.grad((scores * 0.0).sum(), inputs.trained)
    assert all((x == 0).all() for x in results)


@pytest.mark.parametrize("prediction", ("right", "wrong", "frozen"))
def test_the_number_of_products(prediction: str):
    inputs = random_inputs(
        T, V, D, torch.float32, bias=False, needs_grad=(True, prediction != "frozen", False)
    )
    counters = [FlopCounterMode(display=False) for _ in range(2)]

    def loss(scores: Tensor) -> Tensor:
        return scores.square().sum() if prediction == "wrong" else scores.sum() / 3

    with tile_size(3, 8), chunk_size(4):
        with counters[0]:
            scores = inputs.scores(impl="chunked", fused_loss=FusedLoss(loss, GROUPS))
        with counters[1]:
            scores.sum().backward()
    products = {"right": [3, 0], "wrong": [3, 3], "frozen": [2, 0]}[prediction]
    assert [counter.get_total_flops() for counter in counters] == [n * 2 * T * D * V for n in products]


def narrow_room(t: int, v: int, d: int, tokens: int) -> int:
    """Room for the sums of a bfloat16 head and a chunk, but not for all tiles."""
    room = 4 * v * d + 2 * v * tokens
    assert room < 2 * t * v
    return room


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_several_chunks_are_summed_in_float32(dtype: torch.dtype, monkeypatch):
    t, v, d = 32, V, D
    monkeypatch.setattr(fused_backward, "cache_room", lambda weight: narrow_room(t, v, d, 16))
    for tokens in (1, 16):
        inputs, counter = random_inputs(t, v, d, dtype, bias=False), FlopCounterMode(display=False)
        expected, eager = truth(inputs), values_and_grads(inputs.scores(impl="eager"), inputs)
        with tile_size(3, 16), chunk_size(tokens):
            with counter:
                fused_loss = FusedLoss(weighted_sum, torch.arange(t) // 4)
                scores = inputs.scores(impl="chunked", fused_loss=fused_loss)
            for one, plain, true in zip(values_and_grads(scores, inputs), eager, expected, strict=True):
                assert one.dtype == plain.dtype
                assert relative_error(one, true) <= max(
                    3 * relative_error(plain, true), 3 * torch.finfo(dtype).eps
                )
        # in float16 they are left to backward
        assert counter.get_total_flops() == (1 if dtype == torch.float16 else 3) * 2 * t * d * v


def test_many_chunks_lose_nothing_to_bfloat16(monkeypatch):
    t, v, d = 512, 16, 8
    monkeypatch.setattr(fused_backward, "cache_room", lambda weight: narrow_room(t, v, d, 4))
    inputs, errors = random_inputs(t, v, d, torch.bfloat16, bias=False), []
    for tokens in (999, 4):
        with chunk_size(tokens):
            fused_loss = FusedLoss(weighted_sum, torch.arange(t) // 4)
            got = values_and_grads(inputs.scores(impl="chunked", fused_loss=fused_loss), inputs)
        errors.append([relative_error(*pair) for pair in zip(got[1:], truth(inputs)[1:], strict=True)])
    assert all(many <= 1.5 * one for one, many in zip(*errors, strict=True))


@pytest.mark.parametrize("room", (4 * V * D + 2 * V * 4 - 1, 2 * 64 * V), ids=("none", "for all tiles"))
def test_narrow_gradients_are_left_to_backward_where_sums_do_not_help(room: int, monkeypatch):
    monkeypatch.setattr(fused_backward, "cache_room", lambda weight: room)
    inputs, counter = random_inputs(64, V, D, torch.bfloat16, bias=False), FlopCounterMode(display=False)
    with chunk_size(4), counter:
        inputs.scores(impl="chunked", fused_loss=FusedLoss(weighted_sum, torch.arange(64) // 4))
    assert counter.get_total_flops() == 2 * 64 * D * V


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
    inputs = random_inputs(T, V, D, torch.float32)
    inputs = Inputs(
        *(x.detach().to(d).requires_grad_() for x, d in zip(inputs[:3], dtypes, strict=True)), inputs.targets
    )
    with chunk_size(4):
        scores = inputs.scores(
            impl="chunked", fused_loss=FusedLoss(lambda scores: weighted_sum(scores) * 1e-7, GROUPS)
        )
        (weighted_sum(scores) * 1e-7 * 65536).backward()
    for one, true in zip(inputs.trained, truth(inputs)[1:], strict=True):
        assert relative_error(one.grad, true * 1e-7 * 65536) < 3e-3


def test_under_autocast():
    inputs = random_inputs(T, V, D, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), chunk_size(4):
        results = values_and_grads(
            inputs.scores(impl="chunked", fused_loss=FusedLoss(weighted_sum, GROUPS)), inputs
        )
        plain = values_and_grads(inputs.scores(impl="eager"), inputs)
    for one, eager, true in zip(results, plain, truth(inputs), strict=True):
        assert one.dtype == torch.float32 and relative_error(one, true) < 3 * relative_error(eager, true)


def test_backward_may_run_twice():
    inputs = random_inputs(T, V, D)
    with chunk_size(4):
        scores = inputs.scores(impl="chunked", fused_loss=FusedLoss(weighted_sum, GROUPS))
    grad = cotangent(T)
    first = torch.autograd.grad(scores, inputs.trained, grad, retain_graph=True)
    second = torch.autograd.grad(scores, inputs.trained, 2 * grad)
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(2 * one, two)


def test_gradients_are_not_copied():
    inputs = random_inputs(T, V, D, torch.float32)
    scores = inputs.scores(impl="chunked", fused_loss=FusedLoss(weighted_sum, GROUPS))
    computed = [x.data_ptr() for x in scores.grad_fn.grads]
    weighted_sum(scores).backward()
    assert [x.grad.data_ptr() for x in inputs.trained] == computed


def test_double_backward_is_refused():
    inputs = random_inputs(T, V, D)
    loss = inputs.scores(impl="chunked", fused_loss=FusedLoss(weighted_sum, GROUPS)).sum().sigmoid()
    with pytest.raises(RuntimeError, match="should be differentiated once"):
        torch.autograd.grad(loss, inputs.trained, create_graph=True)


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_without_gradients_the_loss_is_not_called(mode):
    with mode():
        random_inputs(T, V, D).scores(impl="chunked", fused_loss=FusedLoss(fail_if_called, GROUPS))
    random_inputs(T, V, D, needs_grad=(True, False, False)).scores(
        impl="chunked", fused_loss=FusedLoss(fail_if_called, GROUPS)
    )
    random_inputs(0, V, D).scores(
        impl="chunked", fused_loss=FusedLoss(fail_if_called, GROUPS[:0])
    ).sum().backward()


def test_with_extras_the_loss_is_not_called():
    inputs = random_inputs(T, V, D)
    scores, _ = inputs.scores(
        impl="chunked", extras=["entropy"], fused_loss=FusedLoss(fail_if_called, GROUPS)
    )
    for one, true in zip(values_and_grads(scores, inputs), truth(inputs), strict=True):
        torch.testing.assert_close(one, true)


def test_eager_does_not_call_the_loss():
    inputs = random_inputs(T, V, D)
    for one, true in zip(
        values_and_grads(inputs.scores(impl="eager", fused_loss=FusedLoss(fail_if_called)), inputs),
        truth(inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, true)


@pytest.mark.pitfall(24)
def test_inside_activation_checkpointing():
    inputs = random_inputs(T, V, D)
    with chunk_size(4):
        scores = checkpoint(
            lambda: inputs.scores(impl="chunked", fused_loss=FusedLoss(weighted_sum, GROUPS)),
            use_reentrant=False,
        )
    with FlopCounterMode(display=False) as counter:
        results = values_and_grads(scores, inputs)
    for one, true in zip(results, truth(inputs), strict=True):
        torch.testing.assert_close(one, true)
    # the checkpoint runs forward once more, not once for each chunk
    assert counter.get_total_flops() == 3 * 2 * T * D * V + 2 * T * V


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    max_tokens=st.integers(1, 30),
    seed=st.integers(),
)
@FAST
def test_chunks_are_whole_groups(sizes: list[int], max_tokens: int, seed: int):
    numbers = torch.tensor([7 * k - 20 for k, size in enumerate(sizes) for _ in range(size)])
    shuffled = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed % 2**31))]
    chunks = FusedLoss(fail_if_called, shuffled).split(max_tokens, torch.device("cpu"))
    chunks = [torch.arange(len(numbers))[chunk] for chunk in chunks]
    assert sorted(torch.cat(chunks).tolist()) == list(range(len(numbers)))
    groups = [set(shuffled[chunk].tolist()) for chunk in chunks]
    assert sum(map(len, groups)) == len(set.union(*groups))  # no group in two chunks
    assert all(len(c) <= max_tokens or len(g) == 1 for c, g in zip(chunks, groups, strict=True))
    assert len(chunks) <= 1 + 2 * len(numbers) // max_tokens  # two neighbours exceed one chunk


def test_a_group_beyond_the_cache_is_computed_again_in_part():
    t, v, d = 64, 96, 4
    inputs = random_inputs(t, v, d, torch.float32, bias=False)
    counter = FlopCounterMode(display=False)
    with tile_size(t, 16, entry_bytes=4), cache_budget(2 * t * 16 * 4), chunk_size(0), counter:
        results = values_and_grads(inputs.scores(impl="chunked", fused_loss=FusedLoss(weighted_sum)), inputs)
    # two of its six tiles are cached
    assert counter.get_total_flops() == (3 + 4 / 6) * 2 * t * v * d
    for one, true in zip(results, truth(inputs), strict=True):
        assert relative_error(one, true) < 1e-6


@pytest.mark.parametrize(
    "fused_loss, problem",
    (
        (weighted_sum, "fused_loss should be a FusedLoss, but it is a function"),
        (
            FusedLoss(weighted_sum, GROUPS[:5]),
            r"should have the shape of targets, \(12,\), but its shape is \(5,\)",
        ),
        (FusedLoss(lambda scores: scores), "should return a tensor without dimensions"),
        (FusedLoss(lambda scores: 1.0), "should return a tensor without dimensions"),
    ),
)
def test_refusals(fused_loss: object, problem: str):
    with pytest.raises((TypeError, ValueError), match=problem):
        random_inputs(T, V, D).scores(impl="chunked", fused_loss=fused_loss)


def test_refusals_of_its_arguments():
    with pytest.raises(TypeError, match="should be a function"):
        FusedLoss(3.0)
    with pytest.raises(TypeError, match="int64 tensor"):
        FusedLoss(weighted_sum, GROUPS.float())


def test_gradcheck():
    inputs = random_inputs(5, 5, 3)

    def loss(weight: Tensor, hidden: Tensor) -> Tensor:
        fused_loss = FusedLoss(lambda scores: scores.sigmoid().sum(), torch.arange(5))
        scores = Inputs(hidden, weight, None, inputs.targets).scores(impl="chunked", fused_loss=fused_loss)
        return scores.sigmoid().sum()

    with tile_size(2, 2), chunk_size(2):
        # a second backward computes gradients again, in another order
        assert torch.autograd.gradcheck(loss, (inputs.weight, inputs.hidden), nondet_tol=1e-12)
