"""Layers with a state that are hooked, or replaced after the first look at a model: results stay right."""

import copy
import inspect
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpo_wrapper import DPO
from dpo_wrapper.models.recurrent import RecurrentTree, find_recurrent_layers, install_layer_hook
from dpo_wrapper.models.rerun import run_pass
from dpo_wrapper.prefix_tree import TreeLayout, TreeOptions
from helpers.broken_trees import require_forks
from helpers.dpo_calls import nudged
from helpers.kernels import shares_prefix
from helpers.oracle import ExactFloat64
from helpers.shareable_models import (
    CASES,
    RECURRENT,
    SHAREABLE,
    Make,
    assert_close,
    loss_and_gradients,
    make_dpo,
)
from helpers.trees import paths_of, random_tree

REPLACED = "a layer with a state calls other functions than those that run over a tree"


def add_accelerates_hook(layer: nn.Module) -> None:
    """As a model has them that is spread over devices; they replace the `forward` of the instance."""
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))


def checkpoint_by_hand(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(  # type: ignore[method-assign]
        forward, *args, use_reentrant=False, **kwargs
    )


@pytest.mark.parametrize("name", ["minimax", "xt-gru", "qwen3.5"])
def test_layers_with_hooks_of_accelerate_run_over_the_tree(name):
    if name == "qwen3.5":
        require_forks()
    make, told = RECURRENT[name]
    shared, padded = (make_hooked_dpo(make, add_accelerates_hook, share).double() for share in (True, False))
    with ExactFloat64():
        results, expected = loss_and_gradients(shared, CASES[1]), loss_and_gradients(padded, CASES[1])
    assert_close(results, expected, 1e-10)
    assert told in shared.explain()


def test_layers_that_are_checkpointed_by_hand_run_over_the_tree():
    shared, padded = (
        make_hooked_dpo(SHAREABLE["minimax"], checkpoint_by_hand, share) for share in (True, False)
    )
    assert_close(loss_and_gradients(shared, CASES[1]), loss_and_gradients(padded, CASES[1]), 1e-5)
    assert shares_prefix(shared)


class CumulativeSum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(dim=1)


@pytest.mark.parametrize("bound", ["__call__", "forward"])
def test_what_was_bound_before_runs_along_paths(bound):
    """`torch.compile(layer)` binds `__call__`; and some models call `forward`."""
    layer, tree = CumulativeSum(), random_tree(1)
    call = layer.__call__ if bound == "__call__" else lambda x: layer.forward(x)
    install_layer_hook(CumulativeSum)
    layout = TreeLayout.from_tree(tree, TreeOptions(state="paths"))
    x = torch.randn(1, len(tree.ids), 3, generator=Generator().manual_seed(0))
    out = run_pass(layer, lambda: call(x), RecurrentTree(layout, frozenset([id(layer)])))
    for path in paths_of(tree):
        torch.testing.assert_close(out[0, path], x[0, path].cumsum(dim=0))
    assert layout.kernels == {"paths"} and torch.equal(call(x), x.cumsum(dim=1))


def make_hooked_dpo(make: Make, hook: Callable[[nn.Module], None], share_prefix: bool) -> DPO:
    """A `DPO` to whose policy the hooks have been added before."""
    policy = nudged(make(0).eval(), 0.05)
    for layer in find_state_layers(policy):
        hook(layer)
    return DPO(policy, reference=make(0).eval(), share_prefix=share_prefix)


def find_state_layers(model: nn.Module) -> list[nn.Module]:
    """Those of transformers, or the hybrid modules of x-transformers."""
    hybrid = [m.hybrid_module for m in model.modules() if getattr(m, "hybrid_module", None) is not None]
    return hybrid or find_recurrent_layers(model)


# after the first look


def unhooked(function: Any) -> Any:
    """A copy of a function to which the functions of its module are what they are without this package."""
    function = inspect.unwrap(function)
    names = vars(sys.modules[function.__module__])
    own = {name: inspect.unwrap(value) if callable(value) else value for name, value in names.items()}
    options = function.__name__, function.__defaults__, function.__closure__
    return types.FunctionType(function.__code__, own, *options)


def replace_class(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As libraries patch what is in a module of transformers."""
    monkeypatch.setattr(type(layer), "forward", unhooked(type(layer).forward))


def replace_function(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two that the layer calls."""
    module = sys.modules[inspect.unwrap(type(layer).forward).__module__]
    monkeypatch.setattr(module, "causal_conv1d_fn", inspect.unwrap(vars(module)["causal_conv1d_fn"]))


def replace_instance(layer: Any, _: pytest.MonkeyPatch) -> None:
    layer.forward = types.MethodType(unhooked(type(layer).forward), layer)


@pytest.mark.parametrize("way", [replace_class, replace_function])
def test_sequences_are_padded_where_the_code_of_layers_is_replaced(way, monkeypatch):
    require_forks()
    dpo = make_dpo(SHAREABLE["qwen3.5"], "auto")
    expected = loss_and_gradients(dpo, CASES[1])
    way(find_recurrent_layers(dpo.policy_model)[0], monkeypatch)
    with pytest.warns(UserWarning, match=REPLACED):
        assert_close(loss_and_gradients(dpo, CASES[1]), expected, 1e-5)


@pytest.mark.parametrize(
    "name, way", [("minimax", replace_class), ("minimax", replace_instance), ("qwen3.5", replace_instance)]
)
def test_layers_run_along_paths_where_their_code_is_replaced(name, way, monkeypatch):
    dpo = make_dpo(SHAREABLE[name], "auto")
    expected = loss_and_gradients(dpo, CASES[1])
    way(find_recurrent_layers(dpo.policy_model)[0], monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(loss_and_gradients(dpo, CASES[1]), expected, 1e-5)
    assert shares_prefix(dpo)


@pytest.mark.parametrize("is_other_class", [False, True])
@pytest.mark.parametrize("name", ["minimax", "xt-gru", "qwen3.5"])
def test_layers_that_take_the_place_of_others_run_over_the_tree(name, is_other_class):
    dpo = make_dpo(SHAREABLE[name])
    expected = loss_and_gradients(dpo, CASES[1])
    replaced = find_state_layers(dpo.policy_model)
    for parent in list(dpo.policy_model.modules()):
        for key, child in list(parent.named_children()):
            if child in replaced:
                layer: Any = copy.deepcopy(child)
                if is_other_class:
                    layer.__class__ = type("Other", (type(layer),), {"forward": type(layer).forward})
                setattr(parent, key, layer)
    assert_close(loss_and_gradients(dpo, CASES[1]), expected, 1e-5)
    assert shares_prefix(dpo)
