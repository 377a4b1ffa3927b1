"""Forward passes whose layers may run again in backward (activation checkpointing of any kind).

A layer that is checkpointed runs a second time in backward, when the contexts of the forward pass have ended.
It should then be in the mode of the forward pass, and its attention should find the same prefix tree.
autograd numbers its nodes in the order of their creation, and says which node it is at. The numbers between
the first and the last of a forward pass therefore tell to which pass a layer belongs that runs again.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dpo_wrapper.models.eval_mode import are_held_from_training, hold_modes
from dpo_wrapper.models.list_modules import list_modules

Output = TypeVar("Output")


class _Thread(threading.local):
    """What one thread is doing.

    Attributes:
        tree: of the forward pass that runs, what `attention_tree` returns.
        is_over_tree: whether there is one. `torch.compile` asks for it, and would compile anew for each tree.
        is_along_paths: whether a layer runs along the paths of a tree, which it should not see.
        rerun: the pass of the layer that ran again last, for backward passes inside backward passes; a
            function, which returns None when that pass is gone.
    """

    def __init__(self) -> None:  # in each thread; torch.compile watches attributes of the instance alone
        self.tree: Any = None
        self.is_over_tree = False
        self.is_along_paths = False
        self.rerun: Callable[[], ForwardPass | None] = lambda: None


_thread = _Thread()
_in_backward: "dict[int, list[ForwardPass]]" = {}  # for each backward pass that runs


def run_pass(model: nn.Module, forward: Callable[[], Output], tree: Any = None) -> Output:
    """Call `forward`, which runs the model, so that its layers may run again in backward as they run now.

    With a tree, `attention_tree` returns it to the model's attention, in this thread alone.
    """
    modes = [(module, False) for module in list_modules(model) if not module.training]
    first = torch._C._autograd._get_sequence_nr()
    with _attention_over(tree):
        output = forward()
    if isinstance(output, Tensor) and output.requires_grad:
        forward_pass = ForwardPass(range(first, torch._C._autograd._get_sequence_nr()), modes, tree)
        last = output.grad_fn  # first: torch 2.13 crashes where a view that was written in place gets a hook
        output.register_hook(forward_pass.begin_backward)
        if are_held_from_training(modes) and last is not None:
            # other losses of the same backward pass may follow, whose layers run again in modes of their own
            node = find_first_node(last, forward_pass.numbers)
            node.register_hook(lambda *_: forward_pass.held.close())
    return output


@contextmanager
def _attention_over(tree: Any) -> Iterator[None]:
    before = _thread.tree, _thread.is_over_tree
    _thread.tree, _thread.is_over_tree = tree, tree is not None
    try:
        yield
    finally:
        _thread.tree, _thread.is_over_tree = before


@contextmanager
def without_tree() -> Iterator[None]:
    """Let `attention_tree` find none inside this context."""
    before, _thread.is_along_paths = _thread.is_along_paths, True
    try:
        yield
    finally:
        _thread.is_along_paths = before


def may_be_over_tree() -> bool:
    """Whether `attention_tree` has to be asked; `torch.compile` can trace this, but not that."""
    return (_thread.is_over_tree or len(_in_backward) > 0) and not _thread.is_along_paths


def attention_tree() -> Any:
    """The tree that attention runs over now, in a forward pass or in a layer that runs again; else None."""
    if _thread.is_along_paths:
        return None
    if _thread.tree is not None:
        return _thread.tree
    backward = torch._C._current_graph_task_id()
    if backward == -1 or not _in_backward:
        return None
    if backward in _in_backward:
        node = torch._C._current_autograd_node()  # None in a hook
        passes = [] if node is None else _in_backward[backward]
        found = next((each for each in passes if node._sequence_nr() in each.numbers), None)
        _thread.rerun = (lambda: None) if found is None else weakref.ref(found)
    elif not any(_thread.rerun() in passes for passes in list(_in_backward.values())):
        return None  # a backward pass of others
    rerun = _thread.rerun()
    return None if rerun is None else rerun.tree


class ForwardPass:
    """One forward pass: the numbers of its nodes, the modules' modes, and the tree."""

    def __init__(self, numbers: range, modes: list[tuple[nn.Module, bool]], tree: Any) -> None:
        self.numbers, self.modes, self.tree = numbers, modes, tree
        self.held = ExitStack()

    def begin_backward(self, _grad: Tensor) -> None:
        """Put modules in their modes, and be what `attention_tree` finds, until the backward pass ends."""
        backward = torch._C._current_graph_task_id()
        _in_backward.setdefault(backward, []).append(self)
        if any(module.training != is_training for module, is_training in self.modes):
            self.held.enter_context(hold_modes(self.modes))
        end = _AtEnd()
        end.stack.callback(_forget, backward, self)
        end.stack.callback(self.held.close)
        torch.autograd.Variable._execution_engine.queue_callback(end)


def find_first_node(node: Any, numbers: range) -> Any:
    """Of the nodes behind `node` that have these numbers, the one made first, which is last in backward."""
    first, lowest, visited, queue = node, node._sequence_nr(), {node}, [node]
    while queue:
        for node, _ in queue.pop().next_functions:
            if node is None or node in visited:
                continue
            visited.add(node)
            number = node._sequence_nr()
            if number in numbers:
                queue.append(node)
                if number < lowest:
                    first, lowest = node, number
    return first


def _forget(backward: int, forward_pass: ForwardPass) -> None:
    passes = _in_backward[backward]
    passes.remove(forward_pass)
    if not passes:
        del _in_backward[backward]


class _AtEnd:
    """Closes its stack when called, or when it is dropped, as autograd does after an error in backward."""

    def __init__(self) -> None:
        self.stack = ExitStack()

    def __call__(self) -> None:
        self.stack.close()

    __del__ = __call__
