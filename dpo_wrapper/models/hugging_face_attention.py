"""Attention over a prefix tree in models of transformers.

transformers looks attention functions and mask functions up by name, in registries. `install_hooks` wraps
these look-ups, once for the process. While a model runs over a tree they return functions of ours around what
the model would have got; otherwise, and in all other threads, they return what they always do. No model and
no configuration is changed.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from dpo_wrapper.models.recurrent import RecurrentTree
from dpo_wrapper.models.rerun import attention_tree, may_be_over_tree
from dpo_wrapper.models.untraced import untraced
from dpo_wrapper.prefix_tree import PrefixSharingError, attend_along_paths, attend_with_kernel
from dpo_wrapper.prefix_tree.attention import make_causal_mask


@cache
def install_hooks() -> None:
    """Wrap the look-up of attention functions (by index and by method) and of mask functions.

    So is the function that looks for packed sequences, since it waits for the device: a tree has none.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

    attention_by_index: Any = AttentionInterface.__getitem__
    attention_by_method: Any = AttentionInterface.get_interface
    mask_by_index: Any = AttentionMaskInterface.__getitem__
    find_packed: Any = getattr(masking_utils, "find_packed_sequence_indices", None)

    def get_attention_by_index(self: Any, name: str) -> Any:
        attention = attention_by_index(self, name)
        return partial(_attend, name, attention) if may_be_over_tree() else attention

    def get_attention_by_method(self: Any, name: str, default: Any) -> Any:
        attention = attention_by_method(self, name, default)
        is_eager = attention is default  # which each model has for itself, in no registry
        return partial(_attend, "eager", attention) if is_eager and may_be_over_tree() else attention

    def get_mask_by_index(self: Any, name: str) -> Any:
        make_mask = mask_by_index(self, name)
        return partial(_make_mask, make_mask) if may_be_over_tree() else make_mask

    def find_packed_off_trees(position_ids: Tensor) -> Any:
        return None if may_be_over_tree() and attention_tree() is not None else find_packed(position_ids)

    if find_packed is not None:  # some release may have none
        masking_utils.find_packed_sequence_indices = find_packed_off_trees
    AttentionInterface.__getitem__ = get_attention_by_index
    AttentionInterface.get_interface = get_attention_by_method
    AttentionMaskInterface.__getitem__ = get_mask_by_index


def _make_mask(make_mask: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The mask that transformers hands to `_attend`: over a tree none, or the width of a sliding window."""
    if attention_tree() is None:
        return make_mask(*args, **kwargs)
    window = kwargs.get("local_size")
    if window is None:
        return None
    if not any("sliding_window" in name for name in closure_names(kwargs.get("mask_function"))):
        raise PrefixSharingError("its attention is local in another way than by a sliding window")
    # some models tell their attention of it by the mask alone
    return torch.full((1, 1, 1, 1), window, device="cpu")


def closure_names(function: Any) -> Iterator[str]:
    """The names of a function and of all functions in its closure."""
    yield getattr(function, "__qualname__", "")
    for cell in getattr(function, "__closure__", None) or ():
        contents = cell.cell_contents
        for value in contents if isinstance(contents, (tuple, list)) else (contents,):
            if callable(value):
                yield from closure_names(value)


@untraced  # a tree in the trace would have it compiled anew for each tree
def _attend(
    name: str,
    attention: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """An attention function as transformers calls it, around `attention`, which has this name there."""
    tree: RecurrentTree | None = attention_tree()
    if tree is None:
        return attention(module, query, key, value, attention_mask, **kwargs)
    layout = tree.layout
    kwargs.pop("position_ids", None)  # by which other attention tells where packed sequences begin
    window = kwargs.get("sliding_window")
    if attention_mask is not None and attention_mask.numel() > 1:
        raise PrefixSharingError("its attention takes a mask of its own")
    if kwargs.get("position_bias") is not None:
        raise PrefixSharingError("its attention takes a bias that is computed for whole rows")
    if attention_mask is not None and window is None and name in ("eager", "sdpa"):
        window = int(attention_mask)

    def attend_path(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, mask = q.shape[2], None
        if name == "eager" or (name == "sdpa" and window is not None and n > window):
            mask = make_causal_mask(n, window, q.device)
        if name == "eager" and mask is not None:  # it is added to the scores
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
        return rearrange(attention(module, q, k, v, mask, **kwargs)[0], "g n h e -> g h n e")

    out = None
    others = (kwargs.get(option) for option in ("softcap", "s_aux"))
    is_plain = not kwargs.get("dropout") and all(value is None for value in others)
    if name != "eager" and is_plain:
        out = attend_with_kernel(layout, query, key, value, window, kwargs.get("scaling"))
    if out is None:
        out = attend_along_paths(layout, query, key, value, attend_path)
    return rearrange(out, "r h w e -> r w h e"), None
