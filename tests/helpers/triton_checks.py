"""Tests of the Triton kernel, interpreted or on CUDA, which `test_triton_tile.py` runs in another process."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
import triton

from dpo_wrapper.log_probs import EXTRAS, FusedLoss, softmax_cache, tiles, triton_tile
from dpo_wrapper.log_probs.backend import RawTile
from dpo_wrapper.log_probs.statistics import OnlineSoftmax
from dpo_wrapper.log_probs.torch_tile import TorchBackend
from helpers.log_prob_inputs import (
    OPTIONS,
    Inputs,
    chunk_size,
    cotangent,
    random_inputs,
    relative_error,
    slow_extras,
    softmax_caching,
    tile_size,
    truth,
    values_and_grads,
    weighted_sum,
)

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
on_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="measures the memory of a device")


@pytest.fixture(autouse=True)
def narrow_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary has several tiles, as wide as a kernel takes them."""
    monkeypatch.setattr(triton_tile.TritonBackend, "max_width", 16)


WIDTHS = (1, 40)
FLAGS = (True, False)


def thin_out(*factors: Iterable[Any], checks: Sequence[Sequence[int]], divisor: int = 2) -> list[Any]:
    """The product of the factors; for the interpreter, which is slow, a part of it.

    The part is where the indices of the values, summed over the factors of each check, are multiples of the
    divisor. Any two factors still take all pairs of values, and, if checks have four factors, any three all
    triples.
    """
    cases = []
    for numbered in product(*map(enumerate, factors)):
        indices, values = zip(*numbered, strict=True)
        is_kept = all(sum(indices[factor] for factor in check) % divisor == 0 for check in checks)
        if is_kept or DEVICE == "cuda":
            cases.append(pytest.param(*values, id="-".join(map(str, values))))
    return cases


def random_tile(dtype: torch.dtype, options: dict, bias: bool, width: int) -> tuple[torch.Tensor, RawTile]:
    """A tile of 7 tokens with strides, some of whose targets it holds, and the memory that it lies in."""
    generator = torch.Generator().manual_seed(0)
    storage = torch.randn(7, width + 3, generator=generator).mul(2).to(DEVICE, dtype)
    column = torch.tensor([0, width - 1, -1, width // 2, width, 0, -9], device=DEVICE)
    tile_bias = torch.randn(2 * width, generator=generator).to(DEVICE, dtype)[::2] if bias else None
    logit_scale, softcap = options.get("logit_scale", 1.0), options.get("softcap")
    if bias and width > 1:
        tile_bias = tile_bias.contiguous()
        tile_bias[width // 3] = math.inf if logit_scale < 0 else -math.inf  # it is ruled out
    return storage, RawTile(storage[:, :width], column + 5, 5, tile_bias, logit_scale, softcap)


def in_float64(raw: RawTile) -> RawTile:
    bias = None if raw.bias is None else raw.bias.double()
    return raw._replace(product=raw.product.double().clone(), bias=bias)


def random_statistics() -> OnlineSoftmax:
    """Those of tiles that came before; the first token has had none."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(6, 7, generator=generator, dtype=torch.float64).abs()
    values[4] /= 9
    values[1:3] *= torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0])  # one tile holds the target
    values[:, 0] = torch.tensor([-math.inf, 0.0, 0.0, 0.0, 0.0, -math.inf])
    return OnlineSoftmax(values.to(DEVICE))


def assert_tile_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=2 * eps, atol=max(5e-6, eps / 99))


@pytest.mark.parametrize(
    "dtype, name, bias, width, is_weighted, needs_moments",
    thin_out(DTYPES, OPTIONS, FLAGS, WIDTHS, FLAGS, FLAGS, checks=[(0, 1, 2, 3), (2, 3, 4, 5)]),
)
def test_statistics(
    dtype: torch.dtype,
    name: str,
    bias: bool,
    width: int,
    is_weighted: bool,
    needs_moments: bool,
):
    storage, raw = random_tile(dtype, OPTIONS[name], bias, width)
    before = storage.clone()
    expected, got = random_statistics(), OnlineSoftmax(random_statistics().values.float())
    reference = torch.tensor([-math.inf, 9.0, 0.0, -9.0, -9.0, 1.0, -math.inf], device=DEVICE)
    references = [reference.double(), reference] if is_weighted else [None, None]
    true = TorchBackend().reduce(
        in_float64(raw), expected, needs_moments=needs_moments, reference_lse=references[0]
    )
    new = triton_tile.TritonBackend().reduce(
        raw, got, needs_moments=needs_moments, reference_lse=references[1]
    )
    torch.testing.assert_close(got.values.double(), expected.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(storage[:, width:], before[:, width:])  # nothing beside the tile
    if is_weighted:
        assert_tile_close(new.tile, true.tile)
        for one, other in ((new.rescale, true.rescale), (references[1], references[0])):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(storage, before)  # nothing was to be written


@pytest.mark.parametrize(
    "dtype, name, bias, width", thin_out(DTYPES, OPTIONS, FLAGS, WIDTHS, checks=[(0, 1, 2, 3)])
)
def test_gradients_of_logits(dtype: torch.dtype, name: str, bias: bool, width: int):
    storage, raw = random_tile(dtype, OPTIONS[name], bias, width)
    before, generator = storage.clone(), torch.Generator().manual_seed(2)
    statistics = OnlineSoftmax.initial(7, torch.device(DEVICE), torch.float64)
    TorchBackend().reduce(in_float64(raw), statistics)
    lse = torch.logaddexp(statistics.lse, torch.randn(7, generator=generator).to(DEVICE))
    target_grad = torch.rand(7, generator=generator, dtype=torch.float64).to(DEVICE)
    expected = TorchBackend().write_grad(in_float64(raw), None, lse, target_grad)
    got = triton_tile.TritonBackend().write_grad(raw, None, lse.float(), target_grad.float())
    assert_tile_close(got, expected)
    assert torch.equal(storage[:, width:], before[:, width:])


def test_rows_are_scaled():
    values = torch.randn(5, 2050, device=DEVICE)
    factor = torch.tensor([1.0, 0.0, 0.5, 1.0, 3.0], device=DEVICE)
    expected = values * factor[:, None]
    triton_tile.TritonBackend().scale_rows(values, factor)
    assert torch.equal(values, expected)


MODES = {
    "cached": (True, (True, True, True)),
    "recomputed": (False, (True, True, True)),
    "frozen": (True, (True, False, False)),
}


@pytest.mark.parametrize("dtype, name, mode", thin_out(DTYPES, OPTIONS, MODES, checks=[(0, 1, 2)], divisor=3))
def test_log_probs_and_gradients(dtype: torch.dtype, name: str, mode: str):
    options, (is_cached, needs_grad) = OPTIONS[name], MODES[mode]
    cpu = random_inputs(13, 45, 12, dtype, needs_grad=needs_grad, scale=2.0)
    inputs = cpu.to(DEVICE)
    expected = truth(cpu, **options)
    eager = values_and_grads(cpu.scores(impl="eager", **options), cpu)
    with tile_size(7, 23), softmax_caching(is_cached):
        fast = values_and_grads(inputs.scores(impl="triton", **options), inputs)
    for one, plain, true in zip(fast, eager, expected, strict=True):
        assert one.dtype == plain.dtype
        assert relative_error(one.cpu(), true) < max(3 * relative_error(plain, true), 1e-6)
    assert (fast[0] <= 0).all()


@pytest.mark.parametrize("dtype, name, groups", thin_out(DTYPES, OPTIONS, (4, 1), checks=[(0, 1, 2)]))
def test_fused_loss(dtype: torch.dtype, name: str, groups: int):
    cpu, options = random_inputs(13, 45, 12, dtype, scale=2.0), OPTIONS[name]
    inputs = cpu.to(DEVICE)
    expected, eager = truth(cpu, **options), values_and_grads(cpu.scores(impl="eager", **options), cpu)
    fused_loss = FusedLoss(weighted_sum, torch.arange(13, device=DEVICE) // 4 % groups)
    with tile_size(7, 23), chunk_size(0):
        fast = values_and_grads(inputs.scores(impl="triton", fused_loss=fused_loss, **options), inputs)
    for one, plain, true in zip(fast, eager, expected, strict=True):
        assert one.dtype == plain.dtype
        assert relative_error(one.cpu(), true) < max(3 * relative_error(plain, true), 1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("scale", (2.0, 100.0))
def test_extras(options: dict, scale: float):
    inputs = random_inputs(13, 45, 12, torch.float32, scale=scale).to(DEVICE)
    expected = slow_extras(inputs, **options)
    with tile_size(11, 37, entry_bytes=4):
        scores, extras = inputs.scores(impl="triton", extras=EXTRAS, **options)
        assert torch.equal(scores, inputs.scores(impl="triton", **options))
    assert torch.equal(extras["top1"], expected["top1"])
    for name in ("entropy", "log_sum_p2", "greedy"):
        torch.testing.assert_close(extras[name].double(), expected[name], rtol=1e-5, atol=1e-5 * scale)


def test_extreme_logits():
    for size in (1e4, 1e6):
        inputs = random_inputs(11, 53, 6, torch.float32, scale=size)
        with tile_size(5, 21):
            device = inputs.to(DEVICE)
            got = values_and_grads(device.scores(impl="triton"), device)
        assert (got[0] <= 0).all()
        assert relative_error(got[0].cpu(), truth(inputs)[0]) < 1e-6
        assert all(one.isfinite().all() for one in got)


def test_a_tile_of_entries_with_probability_0():
    # tiles of two entries: the target and one of probability 0; two of probability 0; two others
    targets = torch.zeros(4, dtype=torch.long)
    inputs = random_inputs(4, 6, 3, torch.float32)._replace(targets=targets).to(DEVICE)
    bias = inputs.bias.detach().clone()
    bias[1:4] = -math.inf
    few = [0, 4, 5]
    expected = truth(
        Inputs(inputs.hidden, inputs.weight[few].detach().requires_grad_(), bias[few], inputs.targets)
    )
    for is_cached in (True, False):
        with tile_size(2, 2, entry_bytes=4), softmax_caching(is_cached):
            scores, extras = inputs._replace(bias=bias).scores(impl="triton", extras=EXTRAS)
            grads = torch.autograd.grad(scores, (inputs.hidden, inputs.weight), cotangent(4).to(scores))
        for one, other in zip((scores.detach(), grads[0], grads[1][few]), expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
        assert (grads[1][1:4] == 0).all() and all(x.isfinite().all() for x in extras.values())


def test_layouts_and_shapes():
    for t, v in ((0, 5), (1, 1), (3, 1), (1, 50), (7, 33)):
        cpu = random_inputs(t, v, 5, torch.float32)
        inputs = Inputs(
            *(torch.stack([x.detach(), x.detach() + 1], -1).to(DEVICE)[..., 0] for x in cpu[:3]),
            torch.stack([cpu.targets, cpu.targets + 1], -1).to(DEVICE)[:, 0],
        )
        for x in inputs[:3]:
            x.requires_grad_()
        with tile_size(2, 17):
            got = values_and_grads(inputs.scores(impl="triton"), inputs)
        for one, true in zip(got, truth(cpu), strict=True):
            torch.testing.assert_close(one.cpu().double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needs_grad", ((True, True, True), (True, False, False)), ids=("trained", "frozen"))
def test_torchs_default_dtype_changes_nothing(needs_grad: tuple):
    inputs = random_inputs(7, 33, 5, torch.float32, needs_grad=needs_grad).to(DEVICE)
    expected = values_and_grads(inputs.scores(impl="triton"), inputs)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = values_and_grads(inputs.scores(impl="triton"), inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("needs_grad", ((True, True, True), (True, False, False)), ids=("trained", "frozen"))
def test_kernels_are_launched_on_the_device_of_their_tensors(
    needs_grad: tuple, monkeypatch: pytest.MonkeyPatch
):
    guarded, launched = [], []

    @contextmanager
    def watch_device(tensor: torch.Tensor) -> Iterator[None]:
        guarded.append(tensor)
        yield
        guarded.pop()

    class Watched:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int]) -> Any:
            def launch(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
                assert guarded and guarded[-1] is tensor
                launched.append(self.kernel)
                self.kernel[grid](tensor, *args, **kwargs)

            return launch

    names = ("_reduce_kernel", "_write_grad_kernel" if needs_grad[1] else "_scale_rows_kernel")
    for name in names:
        monkeypatch.setattr(triton_tile, name, Watched(getattr(triton_tile, name)))
    monkeypatch.setattr(torch.cuda, "device_of", watch_device)
    monkeypatch.setattr(triton_tile, "is_available_on", lambda device: True)
    inputs = random_inputs(7, 33, 5, torch.float32, needs_grad=needs_grad).to(DEVICE)
    values_and_grads(inputs.scores(impl="triton"), inputs)
    assert len(set(launched)) == 2


def test_float64_is_left_to_torchs_operations():
    cpu = random_inputs(7, 33, 5)
    inputs = cpu.to(DEVICE)
    for one, true in zip(values_and_grads(inputs.scores(impl="triton"), inputs), truth(cpu), strict=True):
        torch.testing.assert_close(one.cpu(), true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_cached, needs_grad", MODES.values(), ids=MODES)
def test_the_same_bits_each_time(is_cached: bool, needs_grad: tuple):
    inputs = random_inputs(13, 45, 12, torch.bfloat16, needs_grad=needs_grad).to(DEVICE)
    with tile_size(11, 37), softmax_caching(is_cached):
        first, *others = (values_and_grads(inputs.scores(impl="triton"), inputs) for _ in range(3))
    assert all(torch.equal(*pair) for other in others for pair in zip(first, other, strict=True))


@on_cuda
@pytest.mark.parametrize("needs_grad", ((True, True, False), (True, False, False)), ids=("trained", "frozen"))
def test_memory(needs_grad: tuple, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_tile.TritonBackend, "max_width", triton_tile.MAX_WIDTH)
    monkeypatch.setattr(softmax_cache, "free_bytes", lambda device: 0)  # or all of them might be cached
    t, v, d = 8192, 2**17, 256  # all logits would be 2 GiB
    hidden = torch.randn(t, d, device=DEVICE, dtype=torch.bfloat16).requires_grad_(needs_grad[0])
    weight = torch.randn(v, d, device=DEVICE, dtype=torch.bfloat16).requires_grad_(needs_grad[1])
    inputs = Inputs(hidden, weight, None, torch.randint(0, v, (t,), device=DEVICE))
    for _ in range(2):  # the first loads libraries
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        grads = torch.autograd.grad(inputs.scores(impl="triton").sum(), inputs.trained)
        peak = torch.cuda.max_memory_allocated() - before
        grad_bytes = sum(x.numel() * x.itemsize for x in grads)
        del grads
    assert peak < grad_bytes + 2 * tiles.TILE_BYTES["other"] + 4 * t * d * 4


@on_cuda
def test_more_than_2_31_logits(monkeypatch: pytest.MonkeyPatch):
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free memory")
    monkeypatch.setattr(triton_tile.TritonBackend, "max_width", triton_tile.MAX_WIDTH)
    t, v, d = 2**14 + 40, 2**17, 8
    assert t * v > 2**31
    inputs = random_inputs(t, v, d, torch.bfloat16, bias=False, needs_grad=(True, False, False)).to(DEVICE)
    targets, last = inputs.targets, slice(t - 3, t)
    scores = inputs.scores(impl="triton")  # in many
    few = Inputs(inputs.hidden[last].detach().requires_grad_(), inputs.weight, None, targets[last])
    torch.testing.assert_close(scores[last].detach(), few.scores(impl="eager").detach(), rtol=1e-2, atol=1e-2)
