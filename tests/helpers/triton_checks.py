"""What `test_triton.py` runs in processes of its own: the Triton fold, interpreted or on CUDA."""

import math

import pytest
import torch
import triton

from dpo_wrapper.log_probs import EXTRAS, FusedLoss
from dpo_wrapper.log_probs import torch_tile as chunked
from dpo_wrapper.log_probs import triton_tile as triton_kernels
from helpers.log_prob_inputs import (
    OPTIONS,
    Inputs,
    cotangent,
    error,
    inputs,
    keeps,
    parts_of,
    slow_extras,
    tiles,
    truth,
    weighted,
    with_grads,
)

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
on_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="measures the memory of a device")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is several blocks of words, the last of which is not full."""
    monkeypatch.setattr(triton_kernels, "BLOCK", 16)


FOLDS = {"plain": {}, "write": {"write": True}, "moments": {"moments": True, "write": True}, "against": None}


@pytest.mark.parametrize("width", (1, 40))
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no-bias"))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fold_is_that_of_torchs_operations(dtype: torch.dtype, options: dict, bias: bool, width: int):
    generator = torch.Generator().manual_seed(0)
    storage = torch.randn(7, width + 3, generator=generator).mul(2).to(DEVICE, dtype)
    block = storage[:, :width]  # rows with stride
    local = torch.tensor([0, width - 1, -1, width // 2, -1, 0, -1], device=DEVICE)
    of_bias = torch.randn(2 * width, generator=generator).to(DEVICE, dtype)[::2] if bias else None
    if bias and width > 1:
        of_bias = of_bias.contiguous()
        of_bias[width // 3] = -math.inf
    given = (local, of_bias, options.get("logit_scale", 1.0), options.get("softcap"))
    if of_bias is not None and given[2] < 0:
        of_bias[of_bias == -math.inf] = math.inf  # a negative scale rules it out

    def run(fold, block, **kwargs):
        return fold(block, local, None if of_bias is None else of_bias.to(block.dtype), *given[2:], **kwargs)

    true = run(chunked.fold, block.double(), moments=True, write=True)
    total = torch.logaddexp(true.lse, torch.randn(7, generator=generator).to(DEVICE))
    at_target = torch.rand(7, generator=generator, dtype=torch.float64).to(DEVICE)
    for name, kwargs in FOLDS.items():
        before = storage.clone()
        if kwargs is None:
            against = {"total": total, "at_target": at_target}
            expected = run(chunked.fold, block.double(), **against)
            kwargs = {key: value.float() for key, value in against.items()}
        else:
            expected = true
        got = run(triton_kernels.fold, before[:, :width], **kwargs)
        assert got.block.dtype == dtype and (got.moments is not None) == (name == "moments")
        if name == "plain":
            assert torch.equal(before, storage)  # nothing was to be written
        else:
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(
                got.block.double(), expected.block, rtol=2 * eps, atol=max(1e-6, eps / 99)
            )
        assert torch.equal(before[:, width:], storage[:, width:])  # nothing beside the tile
        for one, other in zip(got[1:4], expected[1:4], strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
        if name == "moments":
            for one, other in zip(got.moments, expected.moments, strict=True):
                torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


WAYS = {
    "kept": (True, (True, True, True)),
    "again": (False, (True, True, True)),
    "ready": (True, (True, False, False)),
}


@pytest.mark.parametrize("kept, wanted", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs_and_gradients(dtype: torch.dtype, options: dict, kept: bool, wanted: tuple):
    cpu = inputs(13, 45, 12, dtype, wanted=wanted, scale=2.0)
    given = cpu.to(DEVICE)
    expected = truth(cpu, **options)
    eager = with_grads(cpu.scores(impl="eager", **options), cpu)
    with tiles(7, 23), keeps(kept):
        fast = with_grads(given.scores(impl="triton", **options), given)
    for one, plain, true in zip(fast, eager, expected, strict=True):
        assert one.dtype == plain.dtype
        assert error(one.cpu(), true) < max(3 * error(plain, true), 1e-6)
    assert (fast[0] <= 0).all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_made_ahead(dtype: torch.dtype, options: dict):
    cpu = inputs(13, 45, 12, dtype, scale=2.0)
    given = cpu.to(DEVICE)
    expected, eager = truth(cpu, **options), with_grads(cpu.scores(impl="eager", **options), cpu)
    for parts in (4, 1):
        told = FusedLoss(weighted, torch.arange(13, device=DEVICE) // 4 % parts)
        with tiles(7, 23), parts_of(0):
            fast = with_grads(given.scores(impl="triton", fused_loss=told, **options), given)
        for one, plain, true in zip(fast, eager, expected, strict=True):
            assert one.dtype == plain.dtype
            assert error(one.cpu(), true) < max(3 * error(plain, true), 1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("scale", (2.0, 100.0))
def test_extras(options: dict, scale: float):
    given = inputs(13, 45, 12, torch.float32, scale=scale).to(DEVICE)
    expected = slow_extras(given, **options)
    with tiles(11, 37, per_value=4):
        scores, extras = given.scores(impl="triton", extras=EXTRAS, **options)
        assert torch.equal(scores, given.scores(impl="triton", **options))
    assert torch.equal(extras["top1"], expected["top1"])
    for name in ("entropy", "log_sum_p2", "greedy"):
        torch.testing.assert_close(extras[name].double(), expected[name], rtol=1e-5, atol=1e-5 * scale)


def test_extreme_logits():
    for size in (1e4, 1e6):
        given = inputs(11, 53, 6, torch.float32, scale=size)
        with tiles(5, 21):
            device = given.to(DEVICE)
            got = with_grads(device.scores(impl="triton"), device)
        assert (got[0] <= 0).all()
        assert error(got[0].cpu(), truth(given)[0]) < 1e-6 and all(one.isfinite().all() for one in got)


def test_words_ruled_out_alone_in_a_tile():
    # tiles of two words: the target and a word of probability 0; two such words; two others
    given = inputs(4, 6, 3, torch.float32)._replace(targets=torch.zeros(4, dtype=torch.long)).to(DEVICE)
    bias = given.bias.detach().clone()
    bias[1:4] = -math.inf
    few = [0, 4, 5]
    expected = truth(
        Inputs(given.hidden, given.weight[few].detach().requires_grad_(), bias[few], given.targets)
    )
    for kept in (True, False):
        with tiles(2, 2, per_value=4), keeps(kept):
            scores, extras = given._replace(bias=bias).scores(impl="triton", extras=EXTRAS)
            grads = torch.autograd.grad(scores, (given.hidden, given.weight), cotangent(4).to(scores))
        for one, other in zip((scores.detach(), grads[0], grads[1][few]), expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
        assert (grads[1][1:4] == 0).all() and all(x.isfinite().all() for x in extras.values())


def test_layouts_and_shapes():
    for t, v in ((0, 5), (1, 1), (3, 1), (1, 50), (7, 33)):
        cpu = inputs(t, v, 5, torch.float32)
        given = Inputs(
            *(torch.stack([x.detach(), x.detach() + 1], -1).to(DEVICE)[..., 0] for x in cpu[:3]),
            torch.stack([cpu.targets, cpu.targets + 1], -1).to(DEVICE)[:, 0],
        )
        for x in given[:3]:
            x.requires_grad_()
        with tiles(2, 17):
            got = with_grads(given.scores(impl="triton"), given)
        for one, true in zip(got, truth(cpu), strict=True):
            torch.testing.assert_close(one.cpu().double(), true, rtol=1e-5, atol=1e-5)


def test_float64_is_left_to_torchs_operations():
    cpu = inputs(7, 33, 5)
    given = cpu.to(DEVICE)
    for one, true in zip(with_grads(given.scores(impl="triton"), given), truth(cpu), strict=True):
        torch.testing.assert_close(one.cpu(), true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kept, wanted", WAYS.values(), ids=WAYS)
def test_the_same_bits_each_time(kept: bool, wanted: tuple):
    given = inputs(13, 45, 12, torch.bfloat16, wanted=wanted).to(DEVICE)
    with tiles(11, 37), keeps(kept):
        first, *others = (with_grads(given.scores(impl="triton"), given) for _ in range(3))
    assert all(torch.equal(*pair) for other in others for pair in zip(first, other, strict=True))


@on_cuda
@pytest.mark.parametrize("wanted", ((True, True, False), (True, False, False)), ids=("trained", "frozen"))
def test_memory(wanted: tuple, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_kernels, "BLOCK", 4096)
    t, v, d = 8192, 2**17, 256  # all logits would be 2 GiB
    hidden = torch.randn(t, d, device=DEVICE, dtype=torch.bfloat16).requires_grad_(wanted[0])
    weight = torch.randn(v, d, device=DEVICE, dtype=torch.bfloat16).requires_grad_(wanted[1])
    given = Inputs(hidden, weight, None, torch.randint(0, v, (t,), device=DEVICE))
    for _ in range(2):  # the first loads libraries
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        grads = torch.autograd.grad(given.scores(impl="triton").sum(), given.trained)
        peak = torch.cuda.max_memory_allocated() - before
        of_grads = sum(x.numel() * x.itemsize for x in grads)
        del grads
    assert peak < of_grads + 2 * chunked.TILE_BYTES["other"] + 4 * t * d * 4


@on_cuda
def test_more_than_2_31_logits(monkeypatch: pytest.MonkeyPatch):
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free memory")
    monkeypatch.setattr(triton_kernels, "BLOCK", 4096)
    t, v, d = 2**14 + 40, 2**17, 8
    assert t * v > 2**31
    given = inputs(t, v, d, torch.bfloat16, bias=False, wanted=(True, False, False)).to(DEVICE)
    block = given.hidden.detach() @ given.weight.T
    local = given.targets
    last = slice(t - 3, t)
    true = chunked.fold(block[last].double(), local[last], None, 1.0, None, write=True)
    got = triton_kernels.fold(block, local, None, 1.0, None, write=True)  # in one tile
    torch.testing.assert_close(got.lse[last].double(), true.lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.block[last].double(), true.block, rtol=1e-2, atol=1e-6)
    del block, got
    scores = given.scores(impl="triton")  # in many
    few = Inputs(given.hidden[last].detach().requires_grad_(), given.weight, None, local[last])
    torch.testing.assert_close(scores[last].detach(), few.scores(impl="eager").detach(), rtol=1e-2, atol=1e-2)
