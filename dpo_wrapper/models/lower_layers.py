"""Record what the lower layers of a model give in one forward pass, and let another pass start from it.

Layers are called through their class, whose `__call__` is wrapped once for the process. In the contexts
below it calls something else for some modules, in one thread alone; otherwise it does what it always does.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from dpo_wrapper.models.rerun import attention_tree

Call = Callable[..., Any]


@dataclass(frozen=True)
class DecoderLayer:
    """One of the layers that the hidden states of a model pass in turn.

    Attributes:
        module: holds all parameters of the layer.
        output: the module whose call gives the hidden states behind the layer.
        skipped: what is called instead of other modules of the layer while its output is known.
    """

    module: nn.Module
    output: nn.Module
    skipped: Mapping[nn.Module, Call] = field(default_factory=dict)


class _Thread(threading.local):
    """What one thread calls instead of modules, by their ids; its first argument is the module's own call."""

    calls: Mapping[int, Call] = {}


_thread = _Thread()


class LayerRecord:
    """The hidden states behind the lower layers in one forward pass, from which another pass may start.

    Attributes:
        recorded, replayed: the lower layers of the model in either pass; there may be none.
        output: what the last of them gave, which may be a tuple; None before the first pass.
        is_over_tree: whether that pass was one over a prefix tree.
    """

    def __init__(self, recorded: Sequence[DecoderLayer], replayed: Sequence[DecoderLayer]) -> None:
        self.recorded, self.replayed = recorded, replayed
        self.output: Any = None
        self.is_over_tree = False

    def recording(self) -> AbstractContextManager[None]:
        """Record the output of the last layer inside this context."""

        def record(call: Call, *args: Any, **kwargs: Any) -> Any:
            self.output, self.is_over_tree = call(*args, **kwargs), attention_tree() is not None
            return self.output

        return replaced_calls({layer.output: record for layer in self.recorded[-1:]})

    def replaying(self) -> AbstractContextManager[None]:
        """Compute none of the layers inside this context: each gives what the last one gave."""

        def replay(give: Call, call: Call, *args: Any, **kwargs: Any) -> Any:
            fits = (attention_tree() is not None) == self.is_over_tree  # else the model gave the tree up
            return (give if fits else call)(*args, **kwargs)

        def give_output(*args: Any, **kwargs: Any) -> Any:
            inputs = (*args, *kwargs.values())
            # reentrant checkpoints above ask for it, as they do of embeddings
            needs_grad = any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
            return as_leaves(self.output) if needs_grad and torch.is_grad_enabled() else self.output

        calls: dict[nn.Module, Call] = {layer.output: give_output for layer in self.replayed}
        for layer in self.replayed:
            calls |= layer.skipped
        return replaced_calls({module: partial(replay, give) for module, give in calls.items()})


def as_leaves(output: Any) -> Any:
    """The same tensors, alone or in a tuple, such that gradients are computed of them."""
    if isinstance(output, tuple):
        return tuple(map(as_leaves, output))
    is_float = isinstance(output, Tensor) and output.is_floating_point()
    return output.detach().requires_grad_() if is_float else output


@contextmanager
def replaced_calls(calls: Mapping[nn.Module, Call]) -> Iterator[None]:
    """In this thread call something else instead of these modules inside this context."""
    module_class: Any
    for module_class in map(type, calls):
        install_call(module_class)
    before = _thread.calls
    _thread.calls = {id(module): call for module, call in calls.items()}
    try:
        yield
    finally:
        _thread.calls = before


@cache
def install_call(module_class: Any) -> None:
    """Wrap the `__call__` of a class of modules."""
    own = vars(module_class).get("__call__")

    def __call__(module: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        call = super(module_class, module).__call__ if own is None else partial(own, module)
        replacement = None if torch.compiler.is_compiling() else _thread.calls.get(id(module))
        return call(*args, **kwargs) if replacement is None else replacement(call, *args, **kwargs)

    module_class.__call__ = __call__
