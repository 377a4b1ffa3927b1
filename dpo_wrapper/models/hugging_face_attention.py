"""Attention over a prefix tree in models of transformers.

transformers looks attention functions and mask functions up by name, in registries to which anyone may add.
For an attention like "sdpa" we register a second one. It attends over a tree if the model hands it a layout,
and otherwise calls the first. Inside `attend_over_tree`, a model's configuration names the second.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from dpo_wrapper.models.base import patch_lock, uses_checkpointing
from dpo_wrapper.prefix_tree import PrefixSharingError, TreeLayout, attend_along_paths, attend_with_kernel
from dpo_wrapper.prefix_tree.attention import make_causal_mask

LAYOUT_KEYWORD = "prefix_tree_layout"  # by which a model hands the layout down to its attention
_PREFIX = "dpo_wrapper_tree_"  # of the names of the registered functions
_thread = threading.local()  # `is_over_tree` is True in the thread that runs a model over a tree


@contextmanager
def attend_over_tree(model: nn.Module) -> Iterator[None]:
    """Let a model that is called with `prefix_tree_layout=layout` attend over that tree inside this context.

    A model that checkpoints its activations runs its layers again in backward, after this context has ended.
    Its configuration therefore keeps the registered attention, which without a layout does what the model's
    own does.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    key = "_attn_implementation_internal"
    with patch_lock, ExitStack() as stack:
        is_rerun = any(map(uses_checkpointing, model.modules()))
        configs: list[Any] = [m.config for m in model.modules() if hasattr(m, "config")]
        for config in configs:
            attention_name = config._attn_implementation or "eager"
            if not attention_name.startswith(_PREFIX):
                if not is_rerun:
                    stack.callback(vars(config).__setitem__, key, vars(config).get(key))
                vars(config)[key] = tree_name = _PREFIX + attention_name
                if tree_name not in AttentionInterface():
                    AttentionInterface.register(tree_name, partial(_attend, attention_name))
                    AttentionMaskInterface.register(tree_name, partial(_make_mask, attention_name))
        _thread.is_over_tree = True
        stack.callback(setattr, _thread, "is_over_tree", False)
        yield


def _make_mask(attention_name: str, *args: Any, **kwargs: Any) -> Any:
    """The mask that transformers hands to `_attend`: over a tree none, or the width of a sliding window."""
    from transformers import AttentionMaskInterface

    if not getattr(_thread, "is_over_tree", False):
        return AttentionMaskInterface()[attention_name](*args, **kwargs)
    window = kwargs.get("local_size")
    if window is None:
        return None
    if not any("sliding_window" in name for name in closure_names(kwargs.get("mask_function"))):
        raise PrefixSharingError("its attention is local in another way than by a sliding window")
    return torch.full((1, 1, 1, 1), window)  # some models tell their attention of it by the mask alone


def closure_names(function: Any) -> Iterator[str]:
    """The names of a function and of all functions in its closure."""
    yield getattr(function, "__qualname__", "")
    for cell in getattr(function, "__closure__", None) or ():
        contents = cell.cell_contents
        for value in contents if isinstance(contents, (tuple, list)) else (contents,):
            if callable(value):
                yield from closure_names(value)


def _attend(
    attention_name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """An attention function as transformers calls it; some models pass `attention_mask` by its name."""
    from transformers import AttentionInterface

    if attention_name == "eager":  # each model has its own
        attention = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    else:
        attention = AttentionInterface()[attention_name]
    if attention is None:
        raise PrefixSharingError("its eager attention cannot be found")
    layout: TreeLayout | None = kwargs.pop(LAYOUT_KEYWORD, None)
    if layout is None:
        if getattr(_thread, "is_over_tree", False):
            raise PrefixSharingError("it does not hand keywords down to its attention")
        return attention(module, query, key, value, attention_mask, **kwargs)
    kwargs.pop("position_ids", None)  # by which other attention tells where packed sequences begin
    window = kwargs.get("sliding_window")
    if attention_mask is not None and attention_mask.numel() > 1:
        raise PrefixSharingError("its attention takes a mask of its own")
    if attention_mask is not None and window is None and attention_name in ("eager", "sdpa"):
        window = int(attention_mask)

    def attend_path(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, mask = q.shape[2], None
        if attention_name == "eager" or (attention_name == "sdpa" and window is not None and n > window):
            mask = make_causal_mask(n, window, q.device)
        if attention_name == "eager" and mask is not None:  # it is added to the scores
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
        return rearrange(attention(module, q, k, v, mask, **kwargs)[0], "g n h e -> g h n e")

    out = None
    others = (kwargs.get(name) for name in ("softcap", "position_bias", "s_aux"))
    is_plain = not kwargs.get("dropout") and all(value is None for value in others)
    if attention_name != "eager" and is_plain:
        out = attend_with_kernel(layout, query, key, value, window, kwargs.get("scaling"))
    if out is None:
        out = attend_along_paths(layout, query, key, value, attend_path)
    return rearrange(out, "r h w e -> r w h e"), None
