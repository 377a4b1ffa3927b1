"""The modes in which a model is computed: without dropout for a while, reproducibly.

Nobody's `.train()` or `.eval()` is called: layers may do more there than set their flag (loralib merges its
weights). The `training` flags alone are set, and put back. No dropout rate is changed.
"""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn

from dpo_wrapper.cpu_matmul import is_onednn_faster, onednn_linear
from dpo_wrapper.models.list_modules import list_modules

_lock = threading.RLock()  # a context may end while garbage is collected, anywhere in this thread
_fastpath_holders, _is_fastpath_enabled = 0, True  # how many contexts hold torch's flag, and what it was
_held: "dict[int, _Held]" = {}  # by the id of the module


class _Held(NamedTuple):
    """A module that contexts hold in modes of theirs: its own mode, and theirs, the latest last."""

    module: nn.Module
    own: bool
    modes: dict[object, bool]


@contextmanager
def hold_modes(modes: Sequence[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Set modules' `training` flags inside this context; several threads may hold the same modules.

    A module is in the mode of the latest context that holds it, and in its own when the last has ended.
    """
    holder = object()
    with _lock:
        for module, is_training in modes:  # all are read first: a wrapper may hand its flag on
            held = _held.setdefault(id(module), _Held(module, module.training, {}))
            held.modes[holder] = is_training
        for module, is_training in modes:
            set_mode(module, is_training)
    try:
        yield
    finally:
        with _lock:
            for module, _ in modes:
                held = _held[id(module)]
                del held.modes[holder]
                set_mode(module, next(reversed(held.modes.values()), held.own))
                if not held.modes:
                    del _held[id(module)]


def set_mode(module: nn.Module, is_training: bool) -> None:
    """Set a module's flag, without `nn.Module.__setattr__` where that would do no more but takes long."""
    module_class: Any = type(module)
    if module_class.__setattr__ is nn.Module.__setattr__ and not hasattr(module_class, "training"):
        vars(module)["training"] = is_training
    else:
        module.training = is_training


def are_held_from_training(modes: Sequence[tuple[nn.Module, bool]]) -> bool:
    """Whether one of the modules is held in a mode that is not its own."""
    return any(id(m) in _held and _held[id(m)].own != is_training for m, is_training in modes)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Compute a model in eval mode inside this context, so without dropout.

    Activation checkpointing stays on, for which models of transformers ask for train mode. Recurrent layers
    that have no dropout are computed in train mode, for in eval mode cuDNN gives them no gradients.
    """
    library = sys.modules.get("transformers.modeling_layers")
    layer_class = getattr(library, "GradientCheckpointingLayer", ())
    modules = list_modules(model)
    checkpointing = [m for m in modules if getattr(m, "gradient_checkpointing", False)]
    if any(isinstance(module, layer_class) for module in checkpointing):
        with _lock:
            checkpoint_in_eval_mode(layer_class)
        checkpointing = []
    # code outside of transformers may ask for train mode where it checkpoints the layers below
    training = {id(module) for module in checkpointing}
    training |= {id(m) for m in modules if isinstance(m, nn.RNNBase) and m.dropout == 0}
    with hold_modes([(module, id(module) in training) for module in modules]):
        yield


def train_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Compute a model in train mode inside a context."""
    return hold_modes([(module, True) for module in list_modules(model)])


@cache
def checkpoint_in_eval_mode(layer_class: Any) -> None:
    """Let transformers' layers checkpoint inside `eval_mode` too; otherwise they do what they always do."""
    call_layer = layer_class.__call__

    def __call__(layer: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        is_checkpointed = layer.gradient_checkpointing and not layer.training and torch.is_grad_enabled()
        if is_checkpointed and id(layer) in _held:
            return layer._gradient_checkpointing_func(partial(call_layer, layer, **kwargs), *args)
        return call_layer(layer, *args, **kwargs)

    layer_class.__call__ = __call__


@contextmanager
def reproducible_forward(model: nn.Module) -> Iterator[None]:
    """Make forward passes of a model round alike inside this context, with gradients and without.

    On the CPU, linear layers use oneDNN where it is faster. torch's transformer layers do not take their
    fused path, which is for passes without gradients alone. Under autocast that path also leaves casts of the
    weights behind, without gradients, that a later pass with gradients would use.
    """
    # torch.compile traces badly under a TorchFunctionMode
    modules = list_modules(model)
    is_compiled = any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in modules)
    with _without_fastpath(), onednn_linear() if is_onednn_faster() and not is_compiled else nullcontext():
        yield


@contextmanager
def _without_fastpath() -> Iterator[None]:
    """Hold the flag, which is one for the process, until no thread needs it."""
    global _fastpath_holders, _is_fastpath_enabled
    with _lock:
        if _fastpath_holders == 0:
            _is_fastpath_enabled = torch.backends.mha.get_fastpath_enabled()
        _fastpath_holders += 1
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        with _lock:
            _fastpath_holders -= 1
            if _fastpath_holders == 0:
                torch.backends.mha.set_fastpath_enabled(_is_fastpath_enabled)
