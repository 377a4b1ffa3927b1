"""Run a model for a trial and leave nothing behind: no gradient, random state, buffer or counter."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from dpo_wrapper.models.wrappers import is_sharded

MAX_BUFFER_NUMEL = 2**22
"""Larger buffers are weights (of quantized layers), which a forward pass does not change."""

NOISE = 0.02
"""The standard deviation of what stands in for a parameter of zeros."""


@contextmanager
def stand_in_parameters(model: nn.Module, replaces_frozen: bool = True) -> Iterator[None]:
    """Inside this context, parameters that train are aliases of themselves, and those of zeros are noise.

    So a backward pass leaves gradients on the aliases alone, and runs no hooks of the parameters, such as
    DistributedDataParallel's. A branch that starts at zero (a zero-initialized projection, a LoRA factor)
    would hide what it does. Sharded parameters and those without data stay as they are; so do frozen ones
    unless `replaces_frozen`.
    """
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    stand_ins: dict[int, nn.Parameter] = {}
    grads = [(p, p.grad) for p in model.parameters()]
    generator = torch.Generator().manual_seed(0)
    try:
        if not is_sharded(model):
            for module in list(model.modules()):
                for name, parameter in list(module._parameters.items()):
                    if parameter is None or not can_be_replaced(parameter):
                        continue
                    if not (replaces_frozen or parameter.requires_grad):
                        continue
                    if id(parameter) not in stand_ins:
                        stand_in = make_stand_in(parameter, generator)
                        if stand_in is None:
                            continue
                        stand_ins[id(parameter)] = stand_in
                    replaced.append((module, name, parameter))
                    setattr(module, name, stand_ins[id(parameter)])
        for parameter, _ in grads:
            parameter.grad = None
        yield
    finally:
        for module, name, parameter in replaced:
            setattr(module, name, parameter)
        for parameter, grad in grads:
            parameter.grad = grad


def can_be_replaced(parameter: nn.Parameter) -> bool:
    """Whether a parameter is a plain one that holds its data (DeepSpeed and offloading take it away)."""
    is_plain = type(parameter) is nn.Parameter and parameter.is_floating_point()
    return is_plain and not (parameter.is_meta or parameter.is_inference() or hasattr(parameter, "ds_id"))


@torch.no_grad()
def make_stand_in(parameter: nn.Parameter, generator: torch.Generator) -> nn.Parameter | None:
    """What stands in for a parameter; None for one that may stay, since it is frozen and not of zeros."""
    start = parameter.detach().reshape(-1)[:32] if parameter.is_contiguous() else parameter.detach()
    if not start.any() and not parameter.any():  # a few elements tell most parameters apart
        noise = NOISE * torch.randn(parameter.shape, generator=generator, device="cpu", dtype=torch.float32)
        return nn.Parameter(noise.to(parameter), requires_grad=parameter.requires_grad)
    return nn.Parameter(parameter.detach()) if parameter.requires_grad else None


@contextmanager
def preserved_state(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put buffers and random states back as they were when this context ends."""
    held = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    copies = [copy_of_buffer(buffer) for _, _, buffer in held]
    python_state = random.getstate()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            with torch.no_grad():
                for (module, name, buffer), before in zip(held, copies, strict=True):
                    module._buffers[name] = buffer
                    if before is not None and buffer._version != before[1]:
                        buffer.copy_(before[0])


def copy_of_buffer(buffer: Tensor) -> tuple[Tensor, int] | None:
    """A copy and the version of a buffer; None for one that a forward pass cannot or does not change."""
    if buffer.numel() > MAX_BUFFER_NUMEL or buffer.is_meta or buffer.is_inference():
        return None
    return buffer.detach().clone(), buffer._version


class CalledModules:
    """Notes the modules of a model that are called inside this context, in `called`."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.called = model, set[int]()

    def __enter__(self) -> "CalledModules":
        def note(module: nn.Module, _: object) -> None:
            self.called.add(id(module))

        self.handles = [module.register_forward_pre_hook(note) for module in self.model.modules()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def owns(self, parameter: nn.Parameter) -> bool:
        """Whether a module that was called holds the parameter."""
        modules = (m for m in self.model.modules() if id(m) in self.called)
        return any(p is parameter for p in chain.from_iterable(m._parameters.values() for m in modules))
