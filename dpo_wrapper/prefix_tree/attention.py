"""Attention over a prefix tree, inside a model that knows nothing of trees.

Everything else in a transformer works token by token, so only the attention core is told. It gathers queries,
keys and values along the paths into ordinary causal sequences, grouped by similar length, runs the model's
own attention on them, and keeps for each unique token the output of one path.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dpo_wrapper.prefix_tree.cpu_attention import branch_attend, mean_length
from dpo_wrapper.prefix_tree.tree import TreeLayout

Core = Callable[[Tensor, Tensor, Tensor], Tensor]


class NotShareable(Exception):
    """Why a model cannot be run over a tree."""


def attend(
    layout: TreeLayout, q: Float[Tensor, "r h w d"], k: Tensor, v: Tensor, core: Core
) -> Float[Tensor, "r h w e"]:
    """`core(q, k, v)` on ordinary sequences, for tokens that lie in rows of width w, the last one padded."""
    rows, _, width, _ = q.shape
    if (rows, width) != layout.shape:
        raise NotShareable(f"its attention has rows of shape {(rows, width)} for tokens in {layout.shape}")
    flat = [rearrange(t, "r h w d -> (r w) h d") for t in (q, k, v)]
    outputs = []
    for group in layout.groups:
        taken = (t.index_select(0, group.flatten()).unflatten(0, group.shape) for t in flat)
        out = core(*(rearrange(t, "g n h d -> g h n d") for t in taken))
        outputs.append(rearrange(out, "g h n e -> (g n) h e"))
    kept = torch.cat(outputs).index_select(0, layout.home)
    return rearrange(kept, "(r w) h e -> r h w e", w=width)


def attend_plainly(
    layout: TreeLayout,
    q: Float[Tensor, "r h w d"],
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float | None,
) -> Float[Tensor, "r h w e"] | None:
    """Softmax attention by the layout's kernel, if that can do it here."""
    if layout.kernel == "flex":
        from dpo_wrapper.prefix_tree.flex_attention import flex_attend  # loaded only where it is used

        return flex_attend(q, k, v, layout.block_mask(window), scale)
    long = mean_length(layout.branches) * q.shape[1] * q.shape[-1] >= layout.least
    if layout.kernel == "branches" and long and window is None and q.shape[-1] == v.shape[-1]:
        q, k, v = (rearrange(t, "r h w d -> 1 h (r w) d") for t in (q, k, v))
        out = branch_attend(q, k, v, layout.branches, scale)
        return rearrange(out, "1 h (r w) e -> r h w e", w=layout.shape[1])
    return None


def causal_mask(n: int, window: int | None, like: Tensor) -> Tensor:
    """Bool[1 1 n n], True where position i may attend to j: `0 <= i - j < window`."""
    distance = torch.arange(n, device=like.device)[:, None] - torch.arange(n, device=like.device)
    seen = distance >= 0
    return (seen if window is None else seen & (distance < window))[None, None]


_patching = threading.RLock()
"""Models are changed for the length of a forward pass, by one thread at a time."""


@contextmanager
def replaced(holder: object, name: str, value: Any) -> Iterator[None]:
    """`holder.name = value` within, as an attribute of the instance alone."""
    own = vars(holder)
    missing = name not in own
    before = own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if missing:
            del own[name]
        else:
            own[name] = before


# x-transformers


@contextmanager
def x_transformers_over(net: Any, layout: TreeLayout) -> Iterator[None]:
    """Within, the attention of a `TransformerWrapper` runs over the tree."""
    library = sys.modules["x_transformers.x_transformers"]
    layers = net.attn_layers
    with _patching, ExitStack() as stack:
        bias, bias_of = layers.rel_pos, None
        if bias is not None:  # worked out for each group of sequences, never for the whole tree
            bias_of = bias.forward
            for name in ("forward", "forward_custom_pos"):
                stack.enter_context(replaced(bias, name, lambda *_: layout.ids.new_zeros(1, 1, 1)))
        for module in net.modules():
            if _runs_again(module):
                raise NotShareable("its layers run again in backward, when the tree is gone")
            if isinstance(module, library.Attention):
                if module.data_dependent_alibi is not None or module.rel_proj_pos_bias is not None:
                    raise NotShareable("its attention has a bias that depends on the data")
                window = None if module.max_attend_past is None else module.max_attend_past + 1
                stack.enter_context(replaced(module, "max_attend_past", None))
                hooked = partial(_x_transformers_attend, layout, module.attend.forward, window, bias_of)
                stack.enter_context(replaced(module.attend, "forward", hooked))
        yield


def _x_transformers_attend(
    layout: TreeLayout,
    original: Callable[..., Any],
    window: int | None,
    bias_of: Callable[[int, int], Tensor] | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    prev_attn: Tensor | None = None,
    row_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    if k.shape[2] != q.shape[2]:
        raise NotShareable("its attention has memory key/values")
    if mask is not None or row_mask is not None or prev_attn is not None:
        raise NotShareable("its attention takes a mask or attention of the layer before")
    if any(value is not None for name, value in kwargs.items() if name != "causal"):
        raise NotShareable("its attention takes " + ", ".join(sorted(kwargs)))
    if attn_bias is None and _is_plain(original.__self__):  # type: ignore[attr-defined]
        scale = original.__self__.scale  # type: ignore[attr-defined]
        if (out := attend_plainly(layout, q, k, v, window, scale)) is not None:
            return out, _intermediates()

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        band = causal_mask(n, window, q) if window is not None and n > window else None
        bias = bias_of(n, n) if attn_bias is not None and bias_of is not None else None
        return original(q, k, v, mask=band, attn_bias=bias, **kwargs)[0]

    return attend(layout, q, k, v, core), _intermediates()


def _intermediates() -> Any:
    """What x-transformers expects beside the output; of its contents the layers fill in what they use."""
    return sys.modules["x_transformers.attend"].Intermediates()


def _is_plain(attend: Any) -> bool:
    """Whether an x-transformers `Attend` is nothing but softmax attention."""
    return attend.flash and not (
        attend.l2_distance or attend.add_zero_kv or (attend.dropout and attend.training)
    )


# Hugging Face

LAYOUT = "prefix_tree_layout"
"""The keyword by which a model hands the layout down to its attention."""

_local = threading.local()


@contextmanager
def hugging_face_over(inner: nn.Module) -> Iterator[None]:
    """Within, a model that is called with `prefix_tree_layout` attends over the tree.

    A model that checkpoints its activations runs its layers again in backward, when this context has ended:
    it keeps the attention, which without a layout does what the model's own does.
    """
    configs: dict[int, Any] = {id(m.config): m.config for m in inner.modules() if hasattr(m, "config")}
    with _patching, ExitStack() as stack:
        for config in configs.values():
            own = config._attn_implementation
            if own is None or not own.startswith(_PREFIX):
                before = vars(config).get("_attn_implementation_internal")
                vars(config)["_attn_implementation_internal"] = _registered(own)
                if not any(map(_runs_again, inner.modules())):
                    stack.callback(vars(config).__setitem__, "_attn_implementation_internal", before)
        _local.over_tree = True
        stack.callback(setattr, _local, "over_tree", False)
        yield


def _runs_again(module: nn.Module) -> bool:
    """Whether it checkpoints activations: transformers' own way, or torch's wrapper (which FSDP uses)."""
    own = getattr(module, "gradient_checkpointing", False) and module.training
    return bool(own) or type(module).__name__ == "CheckpointWrapper"


_PREFIX = "dpo_wrapper_over_tree_"


def _registered(base: str | None) -> str:
    """The name under which transformers finds the attention `base`, able to run over a tree."""
    from transformers import AttentionInterface, AttentionMaskInterface

    base = base or "eager"
    name = _PREFIX + base
    if name not in AttentionInterface():
        AttentionInterface.register(name, partial(_hugging_face_attend, base))
        AttentionMaskInterface.register(name, partial(_hugging_face_mask, base))
    return name


def _hugging_face_mask(base: str, *args: Any, **kwargs: Any) -> Any:
    from transformers import AttentionMaskInterface

    if getattr(_local, "over_tree", False):
        window = kwargs.get("local_size")
        if window is None:
            return None
        if not any("sliding_window" in name for name in _made_of(kwargs.get("mask_function"))):
            raise NotShareable("its attention is local in another way than by a sliding window")
        return torch.full((1, 1, 1, 1), window)  # some models tell their window by the mask alone
    return AttentionMaskInterface()[base](*args, **kwargs)


def _made_of(function: Any) -> Iterator[str]:
    """Names of a function and of those that it closes over."""
    yield getattr(function, "__qualname__", "")
    for cell in getattr(function, "__closure__", None) or ():
        held = cell.cell_contents
        for part in held if isinstance(held, (tuple, list)) else (held,):
            if callable(part):
                yield from _made_of(part)


def _hugging_face_attend(
    base: str, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Any]:
    from transformers import AttentionInterface

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = eager if base == "eager" else AttentionInterface()[base]
    if function is None:
        raise NotShareable("its eager attention cannot be found")
    layout = kwargs.pop(LAYOUT, None)
    if layout is None:
        if getattr(_local, "over_tree", False):
            raise NotShareable("it does not hand keywords down to its attention")
        return function(module, q, k, v, mask, **kwargs)
    kwargs.pop("position_ids", None)  # which tell other attention where packed sequences begin
    window = kwargs.get("sliding_window")
    if mask is not None and mask.numel() > 1:
        raise NotShareable("its attention takes a mask of its own")
    if mask is not None and window is None and base in ("eager", "sdpa"):
        window = int(mask)
    plain = base != "eager" and not kwargs.get("dropout") and kwargs.get("softcap") is None
    if plain and kwargs.get("position_bias") is None and kwargs.get("s_aux") is None:
        out = attend_plainly(layout, q, k, v, window, kwargs.get("scaling"))
        if out is not None:
            return rearrange(out, "r h w e -> r w h e"), None

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, band = q.shape[2], None
        if base == "eager" or (base == "sdpa" and window is not None and n > window):
            band = causal_mask(n, window, q)
        if base == "eager" and band is not None:
            band = torch.zeros_like(band, dtype=q.dtype).masked_fill(~band, torch.finfo(q.dtype).min)
        return rearrange(function(module, q, k, v, band, **kwargs)[0], "g n h e -> g h n e")

    return rearrange(attend(layout, q, k, v, core), "r h w e -> r w h e"), None
