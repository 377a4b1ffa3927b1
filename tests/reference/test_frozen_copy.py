"""A frozen copy reads nothing of the original, however the model holds its weights."""

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from dpo_wrapper import DPO
from helpers.dpo_calls import nudged
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


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("name", ["xt-tied", "xt-alibi", "hf-llama-tied"])
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
