"""Layers that carry a state along the sequence, told by what they are made of, over a prefix tree."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from dpo_wrapper.models.rerun import attention_tree, may_be_over_tree, without_tree
from dpo_wrapper.models.untraced import untraced
from dpo_wrapper.prefix_tree import PrefixSharingError, TreeLayout, note_kernel, run_along_paths

DECAYS = {
    *("A_log", "time_decay"),  # of Mamba and Gated DeltaNet, and of RWKV
    *("recurrent_param", "recurrent_gate_weight"),  # of Griffin
    *("slope_rate", "fgate_preact", "ifgate_preact"),  # of lightning attention, and of xLSTM
}
"""Names of parameters, buffers and modules by which layers let their state decay."""


def find_recurrent_layers(model: nn.Module) -> list[nn.Module]:
    """The layers with a state, a short convolution or a token shift; not those inside of others."""

    def search(module: nn.Module) -> Iterator[nn.Module]:
        if carries_state(module):
            yield module
            return
        for child in module.children():
            yield from search(child)

    return list(dict.fromkeys(search(model)))


def carries_state(module: nn.Module) -> bool:
    """Whether a layer has a state that decays, or a convolution or a shift over tokens (of each channel)."""
    if isinstance(module, nn.RNNBase):
        return True
    children = module._modules.values()
    convolutions = (child for child in children if isinstance(child, nn.Conv1d))
    is_convolution = any(child.groups == child.in_channels > 1 for child in convolutions)
    is_shift = any(isinstance(child, nn.ZeroPad2d) and child.padding[2:] == (1, -1) for child in children)
    names = chain(module._parameters.keys(), module._buffers.keys(), module._modules.keys())
    return is_convolution or is_shift or not DECAYS.isdisjoint(names)


@dataclass(frozen=True)
class RecurrentTree:
    """What the layers of a model need to run over a tree.

    Attributes:
        along_paths: the ids of the layers that run along its paths.
        functions: by the ids of layers, the functions that compute each other layer over a tree.
        called: those that have run over this tree so far.
    """

    layout: TreeLayout
    along_paths: frozenset[int]
    functions: Mapping[int, frozenset[str]] = field(default_factory=dict)
    called: list[str] = field(default_factory=list)


@cache
def install_layer_hook(layer_class: Any) -> None:
    """Wrap `__call__` and `forward` of a class of layers, once for the process.

    While a model runs over a tree that names a layer in `along_paths`, the layer runs along the tree's paths;
    otherwise, and in all other threads, it does what it always does. The `forward` of a layer may be replaced
    at any time, as accelerate does to move inputs between devices; `torch.compile(layer)` calls what
    `__call__` was when it wrapped the layer.
    """
    for name in ("__call__", "forward"):
        setattr(layer_class, name, _wrap(getattr(layer_class, name), is_forward=name == "forward"))


def _wrap(function: Any, is_forward: bool) -> Any:
    @wraps(function)
    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if may_be_over_tree():
            return _call(function, is_forward, layer, *args, **kwargs)
        return function(layer, *args, **kwargs)

    return call


@untraced  # a tree in the trace would have it compiled anew for each tree
def _call(function: Any, is_forward: bool, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    tree: RecurrentTree | None = attention_tree()
    if tree is None:
        return function(layer, *args, **kwargs)
    if id(layer) in tree.along_paths:
        if is_forward and not any(has_rows_of(tree.layout, value) for value in (*args, *kwargs.values())):
            with without_tree():  # a checkpoint of it runs again, with rows that are paths
                return function(layer, *args, **kwargs)
        note_kernel(tree.layout, "paths")
        return run_layer_along_paths(tree.layout, partial(function, layer), args, kwargs)
    count = len(tree.called)
    output = function(layer, *args, **kwargs)
    if not tree.functions.get(id(layer), frozenset()) <= set(tree.called[count:]):
        raise PrefixSharingError("a layer with a state calls other functions than those that run over a tree")
    return output


def has_rows_of(layout: TreeLayout, value: object) -> bool:
    """Whether a value is a tensor with something for each token of a tree's rows."""
    return isinstance(value, Tensor) and value.shape[:2] == layout.ids.shape


def run_layer_along_paths(
    layout: TreeLayout, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Call a layer along the paths of a tree, with all that it takes of each token.

    It returns an output for each token, which may be the first of several. Tensors among the others are
    states, for which nobody asks where no text is generated; None stands for them.
    """
    values, structure = tree_flatten((args, kwargs))
    of_tokens = [k for k, value in enumerate(values) if has_rows_of(layout, value)]
    results: list[tuple[list[Any], Any]] = []

    def call(*tokens: Tensor) -> Tensor:
        inputs = dict(enumerate(values)) | dict(zip(of_tokens, tokens, strict=True))
        path_args, path_kwargs = tree_unflatten(list(inputs.values()), structure)
        with without_tree():
            results.append(tree_flatten(forward(*path_args, **path_kwargs)))
        out = results[-1][0][0]
        if out.shape[:2] != tokens[0].shape[:2]:
            raise PrefixSharingError("a layer with a state does not return an output for each token")
        return out

    if not of_tokens:
        raise PrefixSharingError("a layer with a state takes other rows than the tree's")
    out = run_along_paths(layout, [values[k] for k in of_tokens], call)
    leaves, structure = results[-1]
    others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves[1:]]
    return tree_unflatten([out, *others], structure)
