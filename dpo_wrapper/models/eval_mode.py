"""The modes in which a model is computed: without dropout, in eval mode for a while, reproducibly."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from dpo_wrapper.cpu_matmul import is_onednn_faster, onednn_linear


def disable_dropout(model: nn.Module) -> None:
    """Put a model in eval mode, which switches off dropout in modules, in functions and of whole layers.

    A module of transformers checkpoints its activations in train mode only. It alone stays in that mode, with
    the dropout rates that its own forward may use set to 0.
    """
    for module in model.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))
        if module.training:
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode inside this context; each module is in its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training


@contextmanager
def reproducible_forward(model: nn.Module) -> Iterator[None]:
    """Make forward passes of a model round alike inside this context, with gradients and without.

    On the CPU, linear layers use oneDNN where it is faster. torch's transformer layers do not take their
    fused path, which is for passes without gradients alone. Under autocast that path also leaves casts of the
    weights behind, without gradients, that a later pass with gradients would use.
    """
    # torch.compile traces badly under a TorchFunctionMode
    is_compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with onednn_linear() if is_onednn_faster() and not is_compiled else nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
