"""Log-probs from the logits that a model returns, against log-softmax in float64."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_wrapper.log_probs import eager, from_logits, gather_log_probs, log_probs_from_logits
from helpers.device_waits import DEVICE, counted_waits
from helpers.log_prob_inputs import relative_error


def random_logits(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    return logits.to(dtype).requires_grad_()


def some_targets(*shape: int, v: int) -> Tensor:
    return torch.randint(0, v, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=(1, 3, 10**6))
def rows_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(from_logits.CHUNK_BYTES, "cpu", request.param * 7 * 8)  # of 7 entries in float64


def test_by_hand():
    # p = (1/2, 1/4, 1/4)
    logits = torch.tensor([[2.0, 1.0, 1.0]] * 2).half() * math.log(2)
    for function in (log_probs_from_logits, eager.log_probs_from_logits):
        scores = function(logits, torch.tensor([0, 2]))
        assert scores.dtype == torch.float32
        assert scores.tolist() == pytest.approx([math.log(1 / 2), math.log(1 / 4)], abs=1e-3)
        assert function(logits.double(), torch.tensor([0, 2])).dtype == torch.float64


@pytest.mark.parametrize("shape", ((), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)), ids=str)
@pytest.mark.parametrize("masked", (False, True))
def test_every_shape(rows_at_once, shape: tuple[int, ...], masked: bool):
    logits, targets = random_logits(*shape, 7), some_targets(*shape, v=7)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.5 if masked else None
    expected = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    if mask is not None:
        targets = targets.where(mask, -100)  # targets that are not scored may be outside the vocabulary
        expected = torch.where(mask, expected, 0.0)
    scores = log_probs_from_logits(logits, targets, mask)
    torch.testing.assert_close(scores, expected)
    grad = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        torch.autograd.grad(scores, logits, grad), torch.autograd.grad(expected, logits, grad)
    )


def test_nothing_is_scored(rows_at_once):
    logits, targets = random_logits(2, 3, 7), some_targets(2, 3, v=7)
    scores = log_probs_from_logits(logits, targets, torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(scores, torch.zeros(2, 3, dtype=torch.float64))
    scores.sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_rows_indexed_more_than_once(rows_at_once):
    logits = random_logits(6, 7)
    row_index = torch.tensor([4, 0, 4, 2, 4, 5, 0])
    targets = torch.tensor([1, 2, 1, 0, 3, 6, 5])  # row 4 twice for entry 1
    scores = gather_log_probs(logits, row_index, targets)
    expected = logits.log_softmax(-1)[row_index, targets]
    torch.testing.assert_close(scores, expected)
    grad = torch.arange(1.0, 8.0).double() - 3.5
    torch.testing.assert_close(
        torch.autograd.grad(scores, logits, grad), torch.autograd.grad(expected, logits, grad)
    )
    assert torch.autograd.gradcheck(lambda x: gather_log_probs(x, row_index, targets), (logits,))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_as_exact_as_log_softmax_in_float32(dtype: torch.dtype):
    logits, targets = random_logits(83, 131, dtype=dtype), some_targets(83, v=131)
    grad = torch.randn(83, generator=torch.Generator().manual_seed(3))
    results = []
    for x in (logits.detach().double(), logits.detach().float(), logits):
        x = x.requires_grad_()
        plain = x is not logits
        scores = x.log_softmax(-1)[range(83), targets] if plain else log_probs_from_logits(x, targets)
        results.append((scores, *torch.autograd.grad(scores, x, grad.to(scores.dtype))))
    true, plain, got = results
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
    true = [x.detach() for x in true]
    assert relative_error(got[0], true[0]) < max(2 * relative_error(plain[0], true[0]), 5e-7)
    assert relative_error(got[1], true[1]) < max(2 * relative_error(plain[1].to(dtype), true[1]), 5e-7)
    assert (got[0] <= 0).all()


def test_extreme_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, -math.inf, 0.0], [80.0, 0.0, 0.0]], requires_grad=True)
    scores = log_probs_from_logits(logits, torch.tensor([1, 0, 0]))
    assert scores.tolist() == pytest.approx([-2e4, -math.log(2), 0.0])
    scores.sum().backward()
    expected = torch.tensor([[-1.0, 1.0, 0.0], [0.5, 0.0, -0.5], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(logits.grad, expected)


def test_layouts():
    storage = random_logits(7, 2, 6)  # vocabulary first
    logits, targets = storage.permute(2, 1, 0), some_targets(6, 2, v=7)
    scores = log_probs_from_logits(logits, targets)
    expected = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(scores, expected)
    grads = [torch.autograd.grad(x.square().sum(), storage) for x in (scores, expected)]
    torch.testing.assert_close(*grads)
    one = random_logits(1, 7)
    expanded = gather_log_probs(one.expand(5, 7), torch.arange(5), torch.arange(5))
    torch.testing.assert_close(expanded, one.log_softmax(-1)[0, :5])
    (grad,) = torch.autograd.grad(expanded.sum(), one)
    expected = torch.autograd.grad(one.log_softmax(-1)[0, :5].sum(), one)[0]
    torch.testing.assert_close(grad, expected)


class LargeTensors(TorchDispatchMode):
    """The storages of all tensors above a limit of bytes that operations return."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.large = limit, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() > self.limit:
                self.large.add(x.untyped_storage().data_ptr())
        return result


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("masked", (False, True))
def test_memory_is_the_gradient_and_chunks(dtype: torch.dtype, masked: bool, monkeypatch: pytest.MonkeyPatch):
    t, v = 200, 100
    logits, targets = random_logits(t, v, dtype=dtype), some_targets(t, v=v)
    mask = torch.arange(t) % 3 > 0 if masked else None
    chunk = 16 * v * 4
    monkeypatch.setitem(from_logits.CHUNK_BYTES, "cpu", chunk)
    with LargeTensors(chunk) as tensors:
        log_probs_from_logits(logits, targets, mask).sum().backward()
    assert tensors.large == {logits.untyped_storage().data_ptr(), logits.grad.untyped_storage().data_ptr()}

    with LargeTensors(chunk) as tensors:  # the measurement shows what log-softmax allocates
        eager.log_probs_from_logits(logits, targets).sum().backward()
    assert len(tensors.large) > 2


def test_logits_changed_before_backward_are_noticed():
    logits = random_logits(3, 7)
    scores = log_probs_from_logits(logits, some_targets(3, v=7))
    with torch.no_grad():
        logits.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()


def test_inputs_are_not_changed_and_backward_may_run_twice():
    logits, targets = random_logits(6, 7), some_targets(6, v=7)
    before = logits.detach().clone()
    scores = log_probs_from_logits(logits, targets)
    first = torch.autograd.grad(scores.sum(), logits, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(scores.sum(), logits)[0])
    assert torch.equal(logits, before)


def test_double_backward_is_refused():
    logits = random_logits(3, 7)
    scores = log_probs_from_logits(logits, some_targets(3, v=7))
    with pytest.raises(RuntimeError, match=r"should be differentiated once, but .*: use logits.log_softmax"):
        torch.autograd.grad(scores.sum(), logits, create_graph=True)


L, T, M = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool)
SHAPES = "should have the shape of logits without the vocabulary, (2, 3), but its shape is "
REFUSED = {
    "logits that are a list": (
        TypeError,
        {"logits": [1.0]},
        "logits should be a tensor of floats, but it is a list.",
    ),
    "logits of int": (
        TypeError,
        {"logits": L.long()},
        "logits should be a tensor of floats, but it is torch.int64.",
    ),
    "targets of float": (
        TypeError,
        {"targets": T.float()},
        "targets should be a tensor of token ids (int64), but it is torch.float32.",
    ),
    "targets of another shape": (
        ValueError,
        {"targets": T[:, :2]},
        f"targets {SHAPES}(2, 2).",
    ),
    "a mask of another shape": (ValueError, {"mask": M[:1]}, f"mask {SHAPES}(1, 3)."),
    "a mask of int": (TypeError, {"mask": M.long()}, "mask should be bool, but it is torch.int64."),
    "a target above": (
        ValueError,
        {"targets": T + 5},
        "targets should be in [0, 5), but one is 5.",
    ),
    "a target below 0": (ValueError, {"targets": T - 1}, "targets should be in [0, 5), but one is -1."),
}


@pytest.mark.parametrize("kind, change, message", REFUSED.values(), ids=REFUSED)
def test_refusals(kind: type[Exception], change: dict, message: str):
    with pytest.raises(kind) as caught:
        log_probs_from_logits(**{"logits": L, "targets": T, "mask": M} | change)
    assert str(caught.value) == message


class Operations(TorchDispatchMode):
    """Counts operations, those that return views left aside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_few_operations_for_a_chunk(monkeypatch: pytest.MonkeyPatch):
    counts = []
    for chunks in (4, 8):
        logits = random_logits(64, 7, dtype=torch.float32)
        monkeypatch.setitem(from_logits.CHUNK_BYTES, "cpu", 64 // chunks * 7 * 4)
        with Operations() as forward:
            scores = log_probs_from_logits(logits, some_targets(64, v=7))
        with Operations() as backward:
            scores.sum().backward()
        counts.append((forward.names.total(), backward.names.total()))
        assert not backward.names.keys() & {"nonzero", "_local_scalar_dense", "_unique2"}
    assert all(many - few <= 4 * 14 for few, many in zip(*counts, strict=True))


@pytest.mark.parametrize("dtype, rows", ((torch.float32, 523), (torch.bfloat16, 523), (torch.float64, 261)))
def test_chunks_of_an_accelerator_are_256_mebibytes(dtype: torch.dtype, rows: int):
    logits = torch.empty(1024, 128256, dtype=dtype, device="meta")
    chunks = list(from_logits.row_chunks(logits, 1024))
    assert len(chunks) == -(-1024 // rows) and max(chunk.stop - chunk.start for chunk in chunks) <= rows


def test_waits_on_an_accelerator():
    logits = random_logits(64, 7, dtype=torch.float32)
    with counted_waits() as waits:
        on_device = logits.detach().to(DEVICE).requires_grad_()
        scores = from_logits.gather_log_probs(
            on_device, torch.arange(64, device=DEVICE), some_targets(64, v=7).to(DEVICE)
        )
        assert waits.total() <= 4
        waits.clear()
        scores.sum().backward()
        assert not waits
        got = [scores.detach().cpu(), on_device.grad.cpu()]
    expected = from_logits.gather_log_probs(logits, torch.arange(64), some_targets(64, v=7))
    expected.sum().backward()
    for one, other in zip(got, (expected.detach(), logits.grad), strict=True):
        assert torch.equal(one, other)
