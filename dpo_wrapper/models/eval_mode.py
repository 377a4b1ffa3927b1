"""The modes that a model is computed in: without dropout, in eval mode for a moment, in one arithmetic."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from dpo_wrapper.cpu_matmul import is_onednn_faster, onednn_linear


def turn_off_dropout(model: nn.Module) -> None:
    """Put a model in eval mode: dropout as modules, as function calls and of whole layers, all at once.

    A module that checkpoints its activations does so in training mode only (transformers), so it alone keeps
    that mode, with rates of dropout that it may use in its own forward set to 0.
    """
    for module in model.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))
        if module.training:
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode within, and each module's own mode again after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def one_arithmetic(model: nn.Module) -> Iterator[None]:
    """Passes of a model round alike within, with gradients or without: linear layers take the library that is
    best here, and torch's transformer layers stay off a fused path that is for passes without gradients.

    Under autocast that path also leaves casts of the weights behind, without gradients, that a later pass
    with gradients would use.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with onednn_linear() if is_onednn_faster() and not is_compiled(model) else nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of a model is; `torch.compile` does not trace well under a mode for functions."""
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())
