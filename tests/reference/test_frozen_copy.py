"""A frozen copy reads nothing of the original, however the model holds its weights."""

import copy
import functools
import threading
import weakref
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune

from dpo_wrapper import DPO
from helpers.adapters import lora
from helpers.dpo_calls import LN2, nudged
from helpers.marks import mark_slow_except
from helpers.models import VOCAB, ZOO, seeded
from helpers.naive_dpo import ARGUMENTS, CASE, assert_reference_stays, logits_of, train


class Tied(nn.Module):
    """A model whose head reads the embedding by some detour; `make` makes the head."""

    def __init__(self, make: Callable[["Tied"], Any]) -> None:
        super().__init__()
        self.e = nn.Embedding(VOCAB, 8)
        self.linear = nn.Linear(8, VOCAB)
        self.head = make(self)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.e(ids))

    def method(self, x: Tensor, times: float = 1.0) -> Tensor:
        return times * x @ self.e.weight.T


class Box:
    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.model.e.weight.T


def with_mutual_recursion(model: Tied) -> Callable[..., Tensor]:
    def even(x: Tensor, n: int = 2) -> Tensor:
        return x @ model.e.weight.T if n == 0 else odd(x, n - 1)

    def odd(x: Tensor, n: int) -> Tensor:
        return even(x, n)

    return even


def with_keyword(model: Tied) -> Callable[..., Tensor]:
    def head(x: Tensor, *, weight: Tensor = model.e.weight) -> Tensor:
        return x @ weight.T

    return head


def with_hook(model: Tied) -> nn.Module:
    model.linear.register_forward_hook(lambda module, args, out: out + model.e.weight.sum())
    return model.linear


def with_patched_forward(model: Tied) -> nn.Module:
    forward = model.linear.forward
    model.linear.forward = lambda x: forward(x) + model.e.weight.sum()
    return model.linear


def with_containers(model: Tied) -> Callable[..., Tensor]:
    model.held = {"heads": [(functools.partial(model.method, times=2.0), lambda x: x @ model.e.weight.T)]}
    return lambda x: model.held["heads"][0][0](x) + model.held["heads"][0][1](x)


def reparametrize(model: Tied, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return wrap(model.linear)


HEADS: dict[str, Callable[[Tied], Any]] = {
    "method": lambda model: model.method,
    "partial of a method": lambda model: functools.partial(model.method, times=2.0),
    "functions that call each other": with_mutual_recursion,
    "default of an argument": lambda model: lambda x, weight=model.e.weight: x @ weight.T,
    "default of a keyword": with_keyword,
    "hook": with_hook,
    "forward replaced": with_patched_forward,
    "containers": with_containers,
    "object": Box,
    "weight_norm": functools.partial(reparametrize, wrap=parametrizations.weight_norm),
    "spectral_norm": functools.partial(reparametrize, wrap=parametrizations.spectral_norm),
    "orthogonal": functools.partial(reparametrize, wrap=parametrizations.orthogonal),
    "weight_norm of old": functools.partial(reparametrize, wrap=torch.nn.utils.weight_norm),
    "pruned": functools.partial(
        reparametrize, wrap=lambda linear: prune.random_unstructured(linear, "weight", 0.3)
    ),
}


@pytest.mark.pitfall(4)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("head", HEADS)
def test_a_copy_reads_nothing_of_the_original(head):
    with seeded(0):
        assert_reference_stays(DPO(Tied(HEADS[head])))


def with_object(model: Tied) -> Callable[..., Tensor]:
    box: Any = Box(model)
    box.head = lambda x: x @ model.e.weight.T
    model.box = box
    return lambda x: model.box.head(x)


OUT_OF_REACH: dict[str, Callable[[Tied], Any]] = {
    "function in an object": with_object,
    "object in a function": lambda model: (lambda box: lambda x: box(x))(Box(model)),
    "cache": lambda model: functools.lru_cache(maxsize=None)(lambda x: x @ model.e.weight.T),
    "weak reference": lambda model: (lambda ref: lambda x: x @ ref().e.weight.T)(weakref.ref(model)),
    "class": lambda model: type("Head", (nn.Module,), {"forward": lambda self, x: x @ model.e.weight.T})(),
}


@pytest.mark.parametrize("head", OUT_OF_REACH)
def test_a_copy_that_would_read_the_original_is_refused(head):
    dpo = DPO(Tied(OUT_OF_REACH[head]))
    with pytest.raises(ValueError, match="would follow the policy: give a separately built model"):
        dpo(**ARGUMENTS)


@pytest.mark.parametrize(
    "name, used",
    mark_slow_except(
        [("xt-tied", False), ("xt-tied", True), ("hf-llama-tied", True)],
        product(["xt-tied", "xt-alibi", "hf-llama-tied"], [False, True]),
    ),
)
def test_a_copy_of_a_dpo_is_independent_of_it(name, used):
    """x-transformers' tied head is a closure: in the copy, the policy's own forward reads its own weights."""
    dpo = DPO(ZOO[name](0))
    if used:
        dpo(**ARGUMENTS)
    nudged(dpo.policy_model, 0.1)
    twin = copy.deepcopy(dpo)
    expected = dpo(**ARGUMENTS)
    logits = logits_of(twin.policy_model, CASE.preferred_seq[0])
    nudged(dpo.policy_model, 0.5)
    assert twin(**ARGUMENTS) == expected
    assert torch.equal(logits_of(twin.policy_model, CASE.preferred_seq[0]), logits)
    train(twin)
    assert all(p.grad is None for p in dpo.parameters())
    assert not torch.equal(logits_of(twin.policy_model, CASE.preferred_seq[0]), logits)


# copies in another dtype


def decoder(**options):
    from x_transformers import Decoder, TransformerWrapper

    wrapper = {name: options.pop(name) for name in ("scaled_sinu_pos_emb",) if name in options}
    layers = Decoder(dim=96, depth=2, heads=2, **options)
    with seeded(0):
        return TransformerWrapper(num_tokens=VOCAB, max_seq_len=600, attn_layers=layers, **wrapper).eval()


POSITIONS = {
    "xt-rotary": (lambda: decoder(rotary_pos_emb=True), "attn_layers.rotary_pos_emb"),
    "xt-polar": (lambda: decoder(polar_pos_emb=True), "attn_layers.polar_pos_emb"),
    "xt-sinusoidal": (lambda: decoder(scaled_sinu_pos_emb=True), "pos_emb"),
    "hf-llama": (lambda: ZOO["hf-llama"](0), "model.rotary_emb"),
}


@pytest.mark.parametrize("name", mark_slow_except(["xt-sinusoidal", "hf-llama"], POSITIONS))
def test_positions_are_told_apart_in_a_low_dtype(name):
    make, path = POSITIONS[name]
    model = make()
    dpo = DPO(model, reference="copy", reference_dtype=torch.bfloat16)
    assert {p.dtype for p in dpo.ref_model.parameters()} == {torch.bfloat16}
    frequencies = [dict(m.get_submodule(path).named_buffers())["inv_freq"] for m in (model, dpo.ref_model)]
    assert torch.equal(*frequencies) and frequencies[1].dtype == torch.float32
    assert frequencies[0].data_ptr() != frequencies[1].data_ptr()
    assert abs(dpo(**ARGUMENTS) - LN2) < 0.05
    if name == "xt-sinusoidal":
        ids = torch.zeros(1, 600, dtype=torch.long)
        exact, low = (m.get_submodule(path)(ids) for m in (model, dpo.ref_model))
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), exact, rtol=0, atol=0.02 * exact.abs().max().item())
    assert abs(copy.deepcopy(dpo).to(torch.float64)(**ARGUMENTS) - LN2) < 0.05


# models that cannot be copied at once, or not at all

RANKS = {
    "gate of values": {"attn_gate_values": True, "attn_gate_values_rank": 4},
    "gate of outputs": {"attn_output_gate": True, "attn_output_gate_rank": 4},
    "aggregated residuals": {"attn_aggregated_residuals": True},
}


@pytest.mark.parametrize("name", mark_slow_except(["gate of values"], RANKS))
def test_layers_whose_new_wants_arguments_are_copied(name):
    model = decoder(**RANKS[name])
    with pytest.raises(TypeError, match="dim_in"):
        copy.deepcopy(model)
    dpo = DPO(model)
    assert_reference_stays(dpo)
    twin = copy.deepcopy(dpo)
    assert torch.equal(twin(**ARGUMENTS), dpo(**ARGUMENTS))
    train(twin)
    assert not torch.equal(twin(**ARGUMENTS), dpo(**ARGUMENTS))


def test_a_model_that_cannot_be_copied_is_told_the_remedy():
    model = ZOO["plain-tied"](0)
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"can be copied, but it raises TypeError .*reference = module"):
        DPO(model)
    assert abs(DPO(model, reference=ZOO["plain-tied"](0))(**ARGUMENTS) - LN2) < 1e-6


def test_a_policy_that_is_sharded_before(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = fully_shard(ZOO["hf-llama"](0))
        with pytest.raises(ValueError, match=r"make DPO before sharding, or give reference = module"):
            DPO(model)
        dpo = DPO(model, reference=ZOO["hf-llama"](0))
        assert abs(dpo(**ARGUMENTS) - LN2) < 1e-5
    finally:
        distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:prefixes are not shared", "ignore:all logits")
@pytest.mark.parametrize("is_on_disk", [True, False])
def test_offloaded_weights(is_on_disk, tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def offload(model):
        cpu = torch.device("cpu")
        accelerate.disk_offload(
            model, tmp_path / str(id(model)), cpu
        ) if is_on_disk else accelerate.cpu_offload(model, cpu)
        return model

    policy = lora(ZOO["hf-llama"](0))
    offload(policy.get_base_model())
    for reference in ("auto", "copy", "adapter"):
        with pytest.raises(
            ValueError, match=r"should be in memory .* but they are offloaded: load the policy"
        ):
            DPO(policy, reference=reference)
    assert abs(DPO(policy, reference=ZOO["hf-llama"](0))(**ARGUMENTS) - LN2) < 1e-6
    assert abs(DPO(ZOO["hf-llama"](0), reference=offload(ZOO["hf-llama"](0)))(**ARGUMENTS) - LN2) < 1e-6
