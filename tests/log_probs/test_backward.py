"""Which gradients `token_log_probs` computes, by what means, and what it leaves alone."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dpo_wrapper.log_probs import tiles as tiling
from dpo_wrapper.log_probs import torch_tile as chunked
from helpers.log_prob_inputs import (
    OPTIONS,
    WANTED,
    Inputs,
    cotangent,
    inputs,
    keeps,
    keeps_bytes,
    slow_scores,
    tiles,
    truth,
    with_grads,
)


def names(wanted: tuple[bool, bool, bool]) -> str:
    return "+".join(name for name, on in zip(("hidden", "weight", "bias"), wanted, strict=True) if on)


@pytest.mark.parametrize("kept", (True, False), ids=("kept", "again"))
@pytest.mark.parametrize(
    "options", ({}, {"logit_scale": 0.7, "softcap": 1.5}), ids=("plain", "scale-softcap")
)
@pytest.mark.parametrize(
    "wanted, bias",
    [(wanted, True) for wanted in WANTED] + [(wanted, False) for wanted in WANTED if not wanted[2]],
    ids=lambda x: names(x) if isinstance(x, tuple) else "" if x else "no-bias",
)
def test_gradcheck(wanted: tuple[bool, bool, bool], bias: bool, options: dict, kept: bool):
    given = inputs(5, 5, 3, bias=bias, wanted=wanted)
    folds = []

    def scores(*trained: Tensor) -> Tensor:
        rest = iter(trained)
        parts = [next(rest) if x is not None and x.requires_grad else x for x in given[:3]]
        return Inputs(*parts, given.targets).scores(impl="chunked", **options)

    def fold(self, rows, words, **kwargs):
        folds.append((rows, words))
        return of_tiles(self, rows, words, **kwargs)

    of_tiles = tiling.Tiles.fold
    with tiles(2, 2), keeps(kept):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiling.Tiles, "fold", fold)
            scores(*given.trained)
        # 2, 2 and 1 tokens; 2, 2 and 1 words
        spans = [slice(0, 2), slice(2, 4), slice(4, 5)]
        assert folds == [(rows, words) for words in spans for rows in spans]
        assert torch.autograd.gradcheck(scores, given.trained)


PRODUCTS = {  # in forward, and in backward beside one for each gradient
    "kept": (1, 0),
    "again": (1, 1),
    "ready": (2, -1),
}


@pytest.mark.parametrize("kept", (True, False), ids=("kept", "again"))
@pytest.mark.parametrize("wanted", WANTED, ids=names)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_only_gradients_that_are_wanted_are_computed(
    wanted: tuple[bool, bool, bool], dtype: torch.dtype, kept: bool
):
    t, d, v = 7, 5, 37
    given = inputs(t, v, d, dtype, wanted=wanted)
    way = "ready" if wanted == (True, False, False) else "kept" if kept else "again"
    forward, backward = PRODUCTS[way]
    counters = [FlopCounterMode(display=False) for _ in range(2)]
    with tiles(3, 5), keeps(kept), Largest() as largest:
        with counters[0]:
            scores = given.scores(impl="chunked")
        with counters[1]:
            scores.sum().backward()
    assert [x is not None and x.grad is not None for x in given[:3]] == list(wanted)
    flops = [counter.get_total_flops() for counter in counters]
    of_bias = 2 * t * v if wanted[2] else 0  # a sum
    expected = [n * 2 * t * d * v for n in (forward, backward + wanted[0] + wanted[1])]
    assert flops == [expected[0], expected[1] + of_bias]
    assert ((v, d) in largest.shapes) == wanted[1]


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_without_gradients_there_is_one_product(mode):
    given = inputs(7, 37, 5)
    counter = FlopCounterMode(display=False)
    with tiles(3, 5), mode(), counter:
        given.scores(impl="chunked")
    assert counter.get_total_flops() == 2 * 7 * 37 * 5


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


@pytest.mark.parametrize("wanted", ((True, True, True), (True, False, False)), ids=names)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_larger_than_a_tile_or_a_gradient_is_made(options: dict, wanted: tuple[bool, bool, bool]):
    t, v, d = 200, 300, 4
    given = inputs(t, v, d, torch.float32, wanted=wanted)
    with tiles(40, 64, per_value=4), keeps(False), Largest() as largest:
        given.scores(impl="chunked", extras=["entropy"], **options)
        given.scores(impl="chunked", **options).sum().backward()
    assert largest.most <= 40 * 64 * 4 and (t, v) not in largest.shapes

    with Largest() as largest:  # the measure sees it where it happens
        given.scores(impl="eager", **options).sum().backward()
    assert largest.most == t * v * 4 and (t, v) in largest.shapes


@pytest.mark.parametrize("kept", range(5))
def test_softmaxes_are_kept_as_far_as_there_is_room(kept: int):
    t, v, d, size = 20, 32, 4, 20 * 8 * 4
    given = inputs(t, v, d, torch.float32, bias=False)
    counter = FlopCounterMode(display=False)
    with tiles(t, 8, per_value=4), keeps_bytes(kept * size), counter:
        found = with_grads(given.scores(impl="chunked"), given)
    assert counter.get_total_flops() == (3 + (4 - min(kept, 4)) / 4) * 2 * t * v * d
    with tiles(t, 8, per_value=4), keeps(True):
        for pair in zip(found, with_grads(given.scores(impl="chunked"), given), strict=True):
            torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)


def test_the_room_for_softmaxes_grows_with_the_head():
    small, large = torch.empty(10, 4), torch.empty(2**16, 2**10, dtype=torch.bfloat16)
    assert chunked.keep_bytes(small) == chunked.keep_bytes(small.to("meta")) == 64 * 2**20
    assert chunked.keep_bytes(large) == 4 * 2**27 and chunked.keep_bytes(large.to("meta")) == 64 * 2**20


def test_nothing_given_is_written_to(impl: str):
    for wanted in ((True, True, True), (True, False, False)):
        given = inputs(7, 5, 3, torch.float32, wanted=wanted)
        before = [x.detach().clone() for x in given]
        with tiles(2, 2, per_value=4):
            scores = given.scores(impl=impl, logit_scale=2.0, softcap=3.0)
            grad = cotangent(7).float()
            first = torch.autograd.grad(scores, given.trained, grad, retain_graph=True)
            result = scores.detach().clone()
            second = torch.autograd.grad(scores, given.trained, grad)
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
        assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))
        assert torch.equal(grad, cotangent(7).float()) and torch.equal(scores, result)


def test_weights_changed_before_backward_are_noticed(chunked_impl: str):
    given = inputs(3, 5, 2)  # backward multiplies by the weights again, so it would use the new ones
    scores = given.scores(impl=chunked_impl)
    with torch.no_grad():
        given.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()


def test_a_frozen_head_may_change_before_backward():
    given = inputs(3, 5, 2, wanted=(True, False, False))
    expected = truth(given)
    scores = given.scores(impl="chunked")
    given.weight.mul_(2.0)  # the gradient is ready
    for pair in zip(with_grads(scores, given), expected, strict=True):
        torch.testing.assert_close(*pair)


TWICE = r"differentiated twice \(create_graph = True\): use impl = 'eager'"


@pytest.mark.parametrize("wanted", ((True, True, True), (True, False, False)), ids=names)
def test_double_backward_is_refused(chunked_impl: str, wanted: tuple[bool, bool, bool]):
    given = inputs(3, 5, 2, wanted=wanted)
    loss = given.scores(impl=chunked_impl).sum().sigmoid()
    with pytest.raises(RuntimeError, match=TWICE):
        torch.autograd.grad(loss, given.trained, create_graph=True)


def test_a_penalty_on_gradients_is_never_dropped_silently(chunked_impl: str):
    given = inputs(3, 5, 2)
    loss = -given.scores(impl=chunked_impl).sum()  # linear in the scores, as SFT is
    with pytest.raises(RuntimeError, match=TWICE):
        torch.autograd.grad(loss, given.hidden, create_graph=True)


def test_eager_can_be_differentiated_twice():
    given = inputs(3, 5, 2)
    assert torch.autograd.gradgradcheck(
        lambda *trained: Inputs(*trained, given.targets).scores(impl="eager"), given.trained
    )


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_without_gradients(impl: str, mode):
    given = inputs(5, 7, 3)
    with mode(), tiles(2, 3):
        scores = given.scores(impl=impl)
    assert not scores.requires_grad and scores.grad_fn is None
    torch.testing.assert_close(scores.clone(), slow_scores(given).detach())
    frozen = inputs(5, 7, 3, wanted=(False, False, False))
    assert not frozen.scores(impl=impl).requires_grad


@pytest.mark.pitfall(24)
def test_inside_activation_checkpointing(impl: str):
    given = inputs(5, 7, 3)
    with tiles(2, 3):
        scores = torch.utils.checkpoint.checkpoint(lambda: given.scores(impl=impl), use_reentrant=False)
        got = with_grads(scores, given)
    for one, expected in zip(got, truth(given), strict=True):
        torch.testing.assert_close(one, expected)
