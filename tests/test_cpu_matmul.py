"""Matrix products through oneDNN, on any processor, against float64 and torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, nn
from torch.utils.checkpoint import checkpoint

from dpo_wrapper import DPO, cpu_matmul
from dpo_wrapper.models import eval_mode
from helpers.batches import random_batch
from helpers.dpo_calls import arguments
from helpers.models import ZOO

try:
    cpu_matmul._onednn_matmul(torch.ones(1, 1), torch.ones(1, 1))
except (AttributeError, RuntimeError):
    pytest.skip("this torch has no oneDNN", allow_module_level=True)


@pytest.fixture
def calls(monkeypatch):
    """oneDNN for every product; the list of those that it made."""
    shapes, onednn_matmul = [], cpu_matmul._onednn_matmul
    monkeypatch.setattr(cpu_matmul, "MIN_MULTIPLICATIONS", 1)
    for module in (cpu_matmul, eval_mode):
        monkeypatch.setattr(module, "is_onednn_faster", lambda: True)
    monkeypatch.setattr(
        cpu_matmul, "_onednn_matmul", lambda *a: shapes.append(tuple(a[0].shape)) or onednn_matmul(*a)
    )
    return shapes


def random_matrix(*shape, seed=0):
    return torch.randn(*shape, generator=Generator().manual_seed(seed))


def error(got, exact):
    return (got.double() - exact).norm() / exact.norm().clamp(min=1e-9)


@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (7, 33, 5), (130, 64, 300), (64, 1, 64)])
def test_products_of_tensors_and_transposes(calls, m, k, n):
    for a in (random_matrix(m, k), random_matrix(k, m).T):
        for b in (random_matrix(k, n, seed=1), random_matrix(n, k, seed=1).T):
            assert error(cpu_matmul.matmul(a, b), a.double() @ b.double()) < 1e-6
    assert len(calls) == 4


def output_and_grads(layer, x, cotangent, context):
    with context:
        out = layer(x)
    leaves = [x, *layer.parameters()]
    return [out, *torch.autograd.grad((out * cotangent).sum(), [t for t in leaves if t.requires_grad])]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 5, 40), (0, 40)])
def test_a_linear_layer_and_its_gradients(calls, bias, shape):
    layer, x, cotangent = (
        nn.Linear(40, 24, bias=bias),
        random_matrix(*shape).requires_grad_(),
        random_matrix(*shape[:-1], 24),
    )
    got = output_and_grads(layer, x, cotangent, cpu_matmul.onednn_linear())
    count = len(calls)
    layer.double()
    exact = output_and_grads(
        layer, x.detach().double().requires_grad_(), cotangent, cpu_matmul.onednn_linear()
    )
    assert count == (3 if len(shape) > 1 and x.numel() else 0) and len(calls) == count  # not for float64
    for one, other in zip(got, exact, strict=True):
        assert one.shape == other.shape and one.stride() == other.stride()
        assert error(one, other) < 1e-6


def test_only_needed_gradients_are_computed(calls):
    layer = nn.Linear(8, 8).requires_grad_(False)
    output_and_grads(
        layer, random_matrix(3, 8).requires_grad_(), random_matrix(3, 8), cpu_matmul.onednn_linear()
    )
    assert len(calls) == 2  # forward, and the gradient of the input


def test_second_derivatives(calls):
    layer, results = nn.Linear(6, 6), []
    for context in (cpu_matmul.onednn_linear(), torch.enable_grad()):
        x = random_matrix(4, 6).requires_grad_()
        with context:
            (grad,) = torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), [x, layer.weight]))
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got, expected, atol=1e-6)


def test_what_is_left_to_torch(calls, monkeypatch):
    layer, x = nn.Linear(8, 8), random_matrix(3, 8)
    with cpu_matmul.onednn_linear():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with torch.backends.mkldnn.flags(enabled=False):
            layer(x)
        checkpoint(layer, random_matrix(3, 8).requires_grad_(), use_reentrant=False).sum().backward()
        layer.bfloat16()(x.bfloat16())
        F.linear(x, random_matrix(8))  # a vector
    layer.float()(x)
    monkeypatch.setattr(cpu_matmul, "MIN_MULTIPLICATIONS", 3 * 8 * 8 + 1)
    with cpu_matmul.onednn_linear():
        layer(x)
    assert not calls
    monkeypatch.setattr(cpu_matmul, "MIN_MULTIPLICATIONS", 3 * 8 * 8)
    with cpu_matmul.onednn_linear():
        layer(x)
    assert calls == [(3, 8)]


def test_the_same_bits_each_time(calls):
    a, b = random_matrix(300, 200), random_matrix(200, 400, seed=1)
    assert all(torch.equal(cpu_matmul.matmul(a, b), cpu_matmul.matmul(a, b)) for _ in range(5))


def test_a_fresh_dpo_starts_at_ln_2_and_trains(calls):
    dpo = DPO(ZOO["xt-rotary-flash"](0))
    loss = dpo(**arguments(random_batch(Generator().manual_seed(0), b=4)))
    assert abs(loss.item() - 0.6931472) < 1e-6
    before = len(calls)
    loss.backward()
    assert len(calls) > before > 0


@pytest.mark.parametrize(
    "vendor, family, capability, faster",
    [
        ("AuthenticAMD", 26, "AVX512", True),
        ("AuthenticAMD", 27, "AVX512", True),
        ("AuthenticAMD", 25, "AVX512", False),
        ("AuthenticAMD", 26, "AVX2", False),
        ("GenuineIntel", 26, "AVX512", False),
        ("AuthenticAMD", None, "AVX512", False),
    ],
)
def test_the_processor_decides(monkeypatch, vendor, family, capability, faster):
    description = f"processor\t: 0\nvendor_id\t: {vendor}\n"
    description += "" if family is None else f"cpu family\t: {family}\nmodel\t\t: 17\n"
    monkeypatch.setattr(cpu_matmul, "cpu_description", lambda: description)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert cpu_matmul.is_onednn_faster.__wrapped__() == faster
    with monkeypatch.context() as patch:
        patch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
        assert not cpu_matmul.is_onednn_faster.__wrapped__()
    monkeypatch.setattr(cpu_matmul, "_onednn_matmul", lambda *_: (_ for _ in ()).throw(AttributeError))
    assert not cpu_matmul.is_onednn_faster.__wrapped__()
