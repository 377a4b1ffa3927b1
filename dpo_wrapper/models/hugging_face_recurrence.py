"""Layers of transformers that carry a state along the sequence, over a prefix tree.

Their code calls the convolution and the recurrence as functions of its module, which have one name in all
families. `install_recurrence_hooks` wraps these functions, once for the process. While a model runs over a
tree each token is computed once, by the function as it is; otherwise, and in all other threads, the functions
do what they always do.
"""

import inspect
import sys
from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dpo_wrapper.models.rerun import attention_tree, may_be_over_tree
from dpo_wrapper.models.untraced import untraced
from dpo_wrapper.prefix_tree import PrefixSharingError, TreeLayout, convolve_over_tree, scan_over_tree
from dpo_wrapper.prefix_tree.gated_delta_rule import apply_gated_delta_rule

Function = Callable[..., Any]

MAX_SEGMENT = 64
"""The longest segments for functions that take time quadratic in their length."""

L2_EPSILON = 1e-6
"""What transformers adds to the squared norms of queries and keys of the gated delta rule."""


def convolve(
    layout: TreeLayout, function: Function, hidden_states: Tensor, weight: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """`causal_conv1d_fn`: a convolution of each channel, of hidden states [r c w] with weights [c width]."""

    def convolve_rows(x: Tensor) -> Tensor:
        return function(x, weight, *args, **kwargs)

    return convolve_over_tree(layout, hidden_states, weight.shape[-1], convolve_rows)


def delta_rule(
    layout: TreeLayout, function: Function, *inputs: Tensor, g: Tensor, beta: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """A delta rule of queries, keys and values.

    The state is kept where the logarithm g of its decay and beta are zero.
    """

    def scan(tokens: tuple[Tensor, ...], state: Tensor | None) -> Any:
        q, k, v, g, beta = tokens
        options = kwargs | {"initial_state": state, "output_final_state": True}
        return function(q, k, v, g=g, beta=beta, **options)

    return scan_over_tree(layout, inputs, [g, beta], scan), None


def gated_delta_rule(
    layout: TreeLayout, function: Function, *inputs: Tensor, g: Tensor, beta: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """The gated delta rule of Qwen 3.5: on the CPU by a function that computes less for short segments."""
    if inputs[0].device.type != "cpu":
        return delta_rule(layout, function, *inputs, g=g, beta=beta, **kwargs)
    q, k, v, g, beta = (t.to(torch.float32) for t in (*inputs, g, beta))
    if kwargs.get("use_qk_l2norm_in_kernel"):
        q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + L2_EPSILON) for t in (q, k))
    q = q * q.shape[-1] ** -0.5

    def scan(tokens: tuple[Tensor, ...], state: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v, g, beta = tokens
        return apply_gated_delta_rule(q, k, v, g, beta, state)

    out = scan_over_tree(layout, [q, k, v], [g, beta], scan, MAX_SEGMENT)
    return out.to(inputs[0].dtype), None


def state_space_duality(
    layout: TreeLayout,
    function: Function,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    /,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **kwargs: Any,
) -> Tensor:
    """The scan of Mamba 2, whose state is kept where the time step dt is zero."""
    is_on_cpu = x.device.type == "cpu"

    def scan(tokens: tuple[Tensor, ...], state: Tensor | None) -> Any:
        x, b, c, dt = tokens
        chunk = {"chunk_size": x.shape[1]} if is_on_cpu else {}  # to which sequences are padded
        options = kwargs | chunk | {"initial_states": state, "return_final_states": True}
        return function(x, dt, a, b, c, **options)

    dt = time_step(dt, dt_bias, dt_softplus).clamp(*dt_limit)
    return scan_over_tree(layout, [x, b, c], [dt], scan, MAX_SEGMENT if is_on_cpu else None)


def selective_scan(
    layout: TreeLayout,
    function: Function,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    /,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    **kwargs: Any,
) -> Tensor:
    """The scan of Mamba 1, of tensors [r d w], which takes no state: what it reads of one is added.

    The state is linear in what it was: behind n tokens `exp(a · (dt_1 + ... + dt_n))` of it is left.
    """

    def scan(tokens: tuple[Tensor, ...], state: Tensor | None) -> tuple[Tensor, Tensor]:
        x, b, c, dt = (t.transpose(1, 2) for t in tokens)
        out, state_behind = function(x, dt, a, b, c, **kwargs, return_last_state=True)
        if state is not None:
            decay = (rearrange(dt.cumsum(-1), "g d n -> g d n 1") * rearrange(a, "d s -> d 1 s")).exp()
            left = decay * rearrange(state, "g d s -> g d 1 s")
            out = out + (left * rearrange(c, "g s n -> g 1 n s")).sum(-1).to(out.dtype)
            state_behind = state_behind + left[:, :, -1]
        return out.transpose(1, 2), state_behind

    dt = time_step(dt.transpose(1, 2), delta_bias, delta_softplus)
    inputs = [t.transpose(1, 2) for t in (x, b, c)]
    out = scan_over_tree(layout, inputs, [dt], scan).transpose(1, 2)
    return out if z is None else out * F.silu(z)


def time_step(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """The time steps of a scan, from the projection [r w d]."""
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return F.softplus(dt) if softplus else dt


def decline(layout: TreeLayout, function: Function, *args: Any, **kwargs: Any) -> None:
    """A kernel of the whole layer: its callers go on by the functions above where it returns nothing."""


OVER_TREE: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": convolve,
    "torch_chunk_gated_delta_rule": gated_delta_rule,
    "chunk_kimi_delta_attention": delta_rule,
    "mamba2_chunk_scan": state_space_duality,
    "mamba_selective_scan": selective_scan,
    "mamba_inner_fn": decline,
    "mamba2_split_conv1d_scan_combined": decline,
}
"""By the names that transformers gives the functions, what computes them over a tree."""


@cache
def called_functions(layer_class: Any) -> frozenset[str]:
    """The functions that the `forward` of a class of layers calls in its module, of those in `OVER_TREE`."""
    code = getattr(inspect.unwrap(layer_class.forward), "__code__", None)  # None in compiled extensions
    names, module = getattr(code, "co_names", ()), module_of(layer_class)
    return frozenset(name for name in OVER_TREE if name in names and callable(getattr(module, name, None)))


def functions_over_tree(layer_class: Any) -> frozenset[str]:
    """Of these functions, those that compute a layer of the class over a tree: all that do not decline."""
    return frozenset(name for name in called_functions(layer_class) if OVER_TREE[name] is not decline)


def module_of(layer_class: Any) -> Any:
    """The module of a class's `forward`, which is not that of the class where FSDP has made a class of it.

    None where Python does not list it, as of a file that was run by hand.
    """
    return sys.modules.get(inspect.unwrap(layer_class.forward).__module__)


def install_recurrence_hooks(layer_class: Any) -> None:
    """Wrap the functions that a class of layers calls."""
    for name in called_functions(layer_class):
        install_function_hook(module_of(layer_class), name)


@cache
def install_function_hook(module: Any, name: str) -> None:
    """Wrap a function of a module of transformers."""
    function = getattr(module, name)
    over_tree = untraced(partial(_call, function, name))

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return over_tree(*args, **kwargs) if may_be_over_tree() else function(*args, **kwargs)

    setattr(module, name, call)


def _call(function: Function, called_name: str, *args: Any, **kwargs: Any) -> Any:
    tree = attention_tree()
    if tree is None:
        return function(*args, **kwargs)
    tree.called.append(called_name)
    names = ("initial_state", "initial_states", "output_final_state", "return_final_states")
    states = [kwargs.pop(name, None) for name in (*names, "return_last_state")]
    if any(isinstance(state, Tensor) or state for state in states):
        raise PrefixSharingError("its layers begin with a state, or ask for one")
    return OVER_TREE[called_name](tree.layout, function, *args, **kwargs)
