"""Models of which upper layers train, and `DPO` of them with and without layers that run once for both."""

import contextlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

from torch import nn

from dpo_wrapper import DPO
from dpo_wrapper.reference.lower_layers import LowerLayers
from helpers.adapters import lora
from helpers.dpo_calls import nudged
from helpers.models import ROTARY
from helpers.shareable_models import CASES, GEMMA2, Make, assert_close, hf, loss_and_gradients, xt

LAYERS = dict(num_hidden_layers=4)
FAMILIES: dict[str, Make] = {
    "llama": hf("Llama", **LAYERS),
    "qwen2": hf("Qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=2, **LAYERS),
    "mistral": hf("Mistral", "sdpa", sliding_window=3, **LAYERS),
    "gemma2": hf("Gemma2", "eager", sliding_window=3, **GEMMA2, **LAYERS),
    "gemma3": hf("Gemma3", config_suffix="TextConfig", head_dim=8, sliding_window=3, **LAYERS),
    "mixtral": hf("Mixtral", num_local_experts=3, num_experts_per_tok=2, **LAYERS),
    "lfm2": hf("Lfm2", layer_types=["conv", "full_attention", "conv", "full_attention"], **LAYERS),
}
XT: dict[str, Make] = {
    "rotary": xt(decoder=ROTARY),
    "flash": xt(decoder=ROTARY | dict(attn_flash=True)),
    "post-norm": xt(decoder=dict(pre_norm=False)),
    "gates": xt(decoder=dict(gate_residual=True)),
    "streams": xt(decoder=dict(num_residual_streams=2)),
}
ONCE = "are computed once for both"


def upper_lora(make: Make, layers: tuple[int, ...] = (2, 3), **kwargs: Any) -> nn.Module:
    return lora(make(0).double(), layers_to_transform=list(layers), **kwargs)


def freeze_lower(model: nn.Module, prefixes: tuple[str, ...]) -> nn.Module:
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(prefixes))
    return model.double()


def move_policy(dpo: DPO) -> DPO:
    """Change all that trains, so that policy and reference differ."""
    trained = nn.ParameterList([p for p in dpo.policy_model.parameters() if p.requires_grad])
    nudged(trained, 0.1)
    return dpo


@contextlib.contextmanager
def whole_passes() -> Iterator[None]:
    with mock.patch.object(LowerLayers, "common_layers", lambda self: ([], [])):
        yield


def assert_same_results(dpo: DPO, case: Any = CASES[1], expected: str = ONCE) -> None:
    """That losses, metrics and all gradients are those of whole passes, and that lower layers ran once."""
    results = loss_and_gradients(dpo, case)
    assert expected in dpo.explain(), dpo.explain()
    with whole_passes():
        assert_close(results, loss_and_gradients(dpo, case), 1e-12)


def explain_after_call(dpo: DPO) -> str:
    assert_same_results(dpo, expected="no layer is computed for both at once")
    return dpo.explain()


COUNTED: "WeakKeyDictionary[nn.Module, Callable[[], None]]" = WeakKeyDictionary()
"""What is called before each run of a module."""


def count_runs(model: nn.Module) -> list[int]:
    """A list to which each layer adds its number when it runs.

    The class of the modules is changed: with hooks, or methods of its own, a model would be probed again.
    """
    runs: list[int] = []
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    for k, layer in enumerate(base.model.layers):
        count_runs_of(type(layer.mlp))
        COUNTED[layer.mlp] = partial(runs.append, k)
    return runs


@cache
def count_runs_of(module_class: Any) -> None:
    own = module_class.forward

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        COUNTED.get(module, lambda: None)()
        return own(module, *args, **kwargs)

    module_class.forward = forward
