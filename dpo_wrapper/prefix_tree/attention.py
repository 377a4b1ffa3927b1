"""Attention over a prefix tree, for models that know nothing of trees.

In a transformer everything but attention works token by token. (`recurrence` is for layers that carry a state
along the sequence.) There are two ways to compute it: `attend_along_paths` runs the model's own attention on
ordinary causal sequences, and `attend_with_kernel` runs a kernel on the tree itself, if attention is plain
softmax attention.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from dpo_wrapper.prefix_tree import cpu_attention, flash_attention
from dpo_wrapper.prefix_tree.layout import TreeLayout
from dpo_wrapper.prefix_tree.paths import check_rows, note_kernel, run_along_paths


def attend_along_paths(
    layout: TreeLayout,
    q: Float[Tensor, "r h w d"],
    k: Float[Tensor, "r g w d"],
    v: Float[Tensor, "r g w e"],
    attention_fn: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Float[Tensor, "r h w e"]:
    """Compute attention over a tree by `attention_fn`, which knows ordinary causal sequences only.

    It maps q, k and v of shape [g h n d] to outputs [g h n e]. They are gathered along the tree's paths,
    attention runs on each group of paths, and for a token on several paths the output on one of them is kept:
    they are all equal.
    """
    check_rows(layout, (q.shape[0], q.shape[2]))
    note_kernel(layout, "model")

    def attend(*tokens: Float[Tensor, "g n h _"]) -> Float[Tensor, "g n h e"]:
        out = attention_fn(*(rearrange(t, "g n h d -> g h n d") for t in tokens))
        return rearrange(out, "g h n e -> g n h e")

    out = run_along_paths(layout, [rearrange(t, "r h w d -> r w h d") for t in (q, k, v)], attend)
    return rearrange(out, "r w h e -> r h w e")


def attend_with_kernel(
    layout: TreeLayout,
    q: Float[Tensor, "r h w d"],
    k: Float[Tensor, "r g w d"],
    v: Float[Tensor, "r g w e"],
    window: int | None,
    scale: float | None,
) -> Float[Tensor, "r h w e"] | None:
    """Compute softmax attention over a tree by the kernel that `layout.options` names.

    Returns None where the kernel does not apply or does not pay. The heads of q may be a multiple of those of
    k and v: each of these belongs to h // g of them that follow one another. With a window a token attends to
    that many tokens, itself included. `scale` is the factor of `q · k`, None for `1 / sqrt(d)`.
    """
    check_rows(layout, (q.shape[0], q.shape[2]))
    options, branches, rows = layout.options, layout.branches, len(layout.ids)
    if options.kernel == "model":
        return None
    if options.kernel == "branches":
        mean_branch_length = branches[-1][0].stop / len(branches)
        pays = mean_branch_length * q.shape[1] * q.shape[-1] >= options.min_branch_numel
        if window is not None or q.shape[-1] != v.shape[-1] or not pays:
            return None
    q, k, v = cast_as_autocast(q, k, v)
    if options.kernel == "flash" and not flash_attention.fits_flash(q, k, v):
        return None
    note_kernel(layout, options.kernel)
    if options.kernel == "flash":
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        out = flash_attention.attend_with_flash(layout, q, k, v, window, scale)
        return out.unflatten(0, (rows, -1)).transpose(1, 2)
    q, k, v = (rearrange(t, "r h w d -> 1 h (r w) d") for t in (q, k, v))
    if options.kernel == "flex":
        from dpo_wrapper.prefix_tree import flex_attention  # imports a part of torch that others do not need

        out = flex_attention.attend_with_flex(q, k, v, layout.block_mask(window), scale)
    else:
        out = cpu_attention.attend_by_branch(q, k, v, branches, scale)
    return rearrange(out, "1 h (r w) e -> r h w e", r=rows)


def cast_as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast, where it is on, hands to `F.scaled_dot_product_attention`: all but float64 cast."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or torch.float64 in {t.dtype for t in tensors}:
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(kind)) for t in tensors)


def make_causal_mask(n: int, window: int | None, device: torch.device) -> Bool[Tensor, "1 1 n n"]:
    """True where position i may attend to position j: `0 <= i - j < window`."""
    distance = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)
    mask = distance >= 0
    return (mask if window is None else mask & (distance < window))[None, None]
