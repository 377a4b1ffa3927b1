"""Which gradients `token_log_probs` computes, with how many products, and that it changes no input."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dpo_wrapper.log_probs.softmax_cache import cache_room
from dpo_wrapper.log_probs.tiles import Tiles
from helpers.log_prob_inputs import (
    NEEDS_GRAD,
    OPTIONS,
    Inputs,
    cache_budget,
    cotangent,
    random_inputs,
    slow_scores,
    softmax_caching,
    tile_size,
    truth,
    values_and_grads,
)
from helpers.marks import mark_slow_except

PLAIN: dict[str, float] = {}
SCALED = {"logit_scale": 0.7, "softcap": 1.5}


def format_names(needs_grad: tuple[bool, bool, bool]) -> str:
    return "+".join(
        name for name, needs in zip(("hidden", "weight", "bias"), needs_grad, strict=True) if needs
    )


@pytest.mark.parametrize(
    "options, is_cached",
    mark_slow_except([(PLAIN, False), (SCALED, True)], product((PLAIN, SCALED), (True, False))),
)
@pytest.mark.parametrize(
    "needs_grad, bias",
    [(needs_grad, True) for needs_grad in NEEDS_GRAD]
    + [(needs_grad, False) for needs_grad in NEEDS_GRAD if not needs_grad[2]],
    ids=lambda x: format_names(x) if isinstance(x, tuple) else "" if x else "no-bias",
)
def test_gradcheck(needs_grad: tuple[bool, bool, bool], bias: bool, options: dict, is_cached: bool):
    inputs = random_inputs(5, 5, 3, bias=bias, needs_grad=needs_grad)
    computed = []

    def scores(*trained: Tensor) -> Tensor:
        leaves = iter(trained)
        tensors = [next(leaves) if x is not None and x.requires_grad else x for x in inputs[:3]]
        return Inputs(*tensors, inputs.targets).scores(impl="chunked", **options)

    def multiply(self, token_slice, vocab_slice, **kwargs):
        computed.append((token_slice, vocab_slice))
        return original(self, token_slice, vocab_slice, **kwargs)

    original = Tiles.multiply
    with tile_size(2, 2), softmax_caching(is_cached):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tiles, "multiply", multiply)
            scores(*inputs.trained)
        # 2, 2 and 1 tokens; 2, 2 and 1 entries
        slices = [slice(0, 2), slice(2, 4), slice(4, 5)]
        assert computed == [(tokens, entries) for entries in slices for tokens in slices]
        assert torch.autograd.gradcheck(scores, inputs.trained)


PRODUCTS = {  # in forward; in backward in addition to one for each gradient
    "cached": (1, 0),
    "recomputed": (1, 1),
    "frozen": (2, -1),
}


@pytest.mark.parametrize("is_cached", (True, False), ids=("cached", "recomputed"))
@pytest.mark.parametrize("needs_grad", NEEDS_GRAD, ids=format_names)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_only_gradients_that_are_needed_are_computed(
    needs_grad: tuple[bool, bool, bool], dtype: torch.dtype, is_cached: bool
):
    t, d, v = 7, 5, 17
    inputs = random_inputs(t, v, d, dtype, needs_grad=needs_grad)
    is_frozen = needs_grad == (True, False, False)
    forward, backward = PRODUCTS["frozen" if is_frozen else "cached" if is_cached else "recomputed"]
    counters = [FlopCounterMode(display=False) for _ in range(2)]
    with tile_size(3, 5), softmax_caching(is_cached), Largest() as largest:
        with counters[0]:
            scores = inputs.scores(impl="chunked")
        with counters[1]:
            scores.sum().backward()
    assert [x is not None and x.grad is not None for x in inputs[:3]] == list(needs_grad)
    flops = [counter.get_total_flops() for counter in counters]
    bias_flops = 2 * t * v if needs_grad[2] else 0  # a sum
    expected = [n * 2 * t * d * v for n in (forward, backward + needs_grad[0] + needs_grad[1])]
    assert flops == [expected[0], expected[1] + bias_flops]
    assert ((v, d) in largest.shapes) == needs_grad[1]


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_without_gradients_there_is_one_product(mode):
    inputs = random_inputs(7, 37, 5)
    counter = FlopCounterMode(display=False)
    with tile_size(3, 5), mode(), counter:
        inputs.scores(impl="chunked")
    assert counter.get_total_flops() == 2 * 7 * 37 * 5


class Largest(TorchDispatchMode):
    """The shapes of the tensors that operations return, and the bytes of the largest one."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.max_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and not func.is_view:
                self.shapes.add(tuple(x.shape))
                self.max_bytes = max(self.max_bytes, x.numel() * x.itemsize)
        return result


@pytest.mark.parametrize("needs_grad", ((True, True, True), (True, False, False)), ids=format_names)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_larger_than_a_tile_or_a_gradient_is_allocated(
    options: dict, needs_grad: tuple[bool, bool, bool]
):
    t, v, d = 200, 300, 4
    inputs = random_inputs(t, v, d, torch.float32, needs_grad=needs_grad)
    with tile_size(40, 64, entry_bytes=4), softmax_caching(False), Largest() as largest:
        inputs.scores(impl="chunked", extras=["entropy"], **options)
        inputs.scores(impl="chunked", **options).sum().backward()
    assert largest.max_bytes <= 40 * 64 * 4 and (t, v) not in largest.shapes

    with Largest() as largest:  # the measurement shows it where it happens
        inputs.scores(impl="eager", **options).sum().backward()
    assert largest.max_bytes == t * v * 4 and (t, v) in largest.shapes


@pytest.mark.parametrize("cached_tiles", range(5))
def test_softmaxes_are_cached_within_the_budget(cached_tiles: int):
    t, v, d, size = 20, 32, 4, 20 * 8 * 4
    inputs = random_inputs(t, v, d, torch.float32, bias=False)
    counter = FlopCounterMode(display=False)
    with tile_size(t, 8, entry_bytes=4), cache_budget(cached_tiles * size), counter:
        limited = values_and_grads(inputs.scores(impl="chunked"), inputs)
    assert counter.get_total_flops() == (3 + (4 - min(cached_tiles, 4)) / 4) * 2 * t * v * d
    with tile_size(t, 8, entry_bytes=4), softmax_caching(True):
        for pair in zip(limited, values_and_grads(inputs.scores(impl="chunked"), inputs), strict=True):
            torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)


def test_the_room_for_tiles_grows_with_the_head_on_the_cpu():
    small, large = torch.empty(10, 4), torch.empty(2**16, 2**10, dtype=torch.bfloat16)
    assert cache_room(small) == cache_room(small.to("meta")) == 64 * 2**20
    assert cache_room(large) == 4 * 2**27 and cache_room(large.to("meta")) == 64 * 2**20


def test_inputs_are_not_changed(impl: str):
    for needs_grad in ((True, True, True), (True, False, False)):
        inputs = random_inputs(7, 5, 3, torch.float32, needs_grad=needs_grad)
        before = [x.detach().clone() for x in inputs]
        with tile_size(2, 2, entry_bytes=4):
            scores = inputs.scores(impl=impl, logit_scale=2.0, softcap=3.0)
            grad = cotangent(7).float()
            first = torch.autograd.grad(scores, inputs.trained, grad, retain_graph=True)
            result = scores.detach().clone()
            second = torch.autograd.grad(scores, inputs.trained, grad)
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
        assert all(torch.equal(*pair) for pair in zip(inputs, before, strict=True))
        assert torch.equal(grad, cotangent(7).float()) and torch.equal(scores, result)


def test_weights_changed_before_backward_are_noticed(tiled_impl: str):
    inputs = random_inputs(3, 5, 2)  # backward multiplies by the weights again, so it would use the new ones
    scores = inputs.scores(impl=tiled_impl)
    with torch.no_grad():
        inputs.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()


def test_a_frozen_head_may_change_before_backward():
    inputs = random_inputs(3, 5, 2, needs_grad=(True, False, False))
    expected = truth(inputs)
    scores = inputs.scores(impl="chunked")
    inputs.weight.mul_(2.0)  # the gradient has been computed
    for pair in zip(values_and_grads(scores, inputs), expected, strict=True):
        torch.testing.assert_close(*pair)


TWICE = "should be differentiated once, but create_graph is True: use impl = 'eager'"


@pytest.mark.parametrize("needs_grad", ((True, True, True), (True, False, False)), ids=format_names)
def test_double_backward_is_refused(tiled_impl: str, needs_grad: tuple[bool, bool, bool]):
    inputs = random_inputs(3, 5, 2, needs_grad=needs_grad)
    loss = inputs.scores(impl=tiled_impl).sum().sigmoid()
    with pytest.raises(RuntimeError, match=TWICE):
        torch.autograd.grad(loss, inputs.trained, create_graph=True)


def test_a_penalty_on_gradients_is_never_dropped_silently(tiled_impl: str):
    inputs = random_inputs(3, 5, 2)
    loss = -inputs.scores(impl=tiled_impl).sum()  # linear in the scores, as SFT is
    with pytest.raises(RuntimeError, match=TWICE):
        torch.autograd.grad(loss, inputs.hidden, create_graph=True)


def test_eager_can_be_differentiated_twice():
    inputs = random_inputs(3, 5, 2)
    assert torch.autograd.gradgradcheck(
        lambda *trained: Inputs(*trained, inputs.targets).scores(impl="eager"), inputs.trained
    )


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_without_gradients(impl: str, mode):
    inputs = random_inputs(5, 7, 3)
    with mode(), tile_size(2, 3):
        scores = inputs.scores(impl=impl)
    assert not scores.requires_grad and scores.grad_fn is None
    torch.testing.assert_close(scores.clone(), slow_scores(inputs).detach())
    frozen = random_inputs(5, 7, 3, needs_grad=(False, False, False))
    assert not frozen.scores(impl=impl).requires_grad


@pytest.mark.pitfall(24)
def test_inside_activation_checkpointing(impl: str):
    inputs = random_inputs(5, 7, 3)
    with tile_size(2, 3):
        scores = checkpoint(lambda: inputs.scores(impl=impl), use_reentrant=False)
        got = values_and_grads(scores, inputs)
    for one, expected in zip(got, truth(inputs), strict=True):
        torch.testing.assert_close(one, expected)
