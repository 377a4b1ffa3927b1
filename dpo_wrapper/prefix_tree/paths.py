"""Run a part of a model that knows ordinary causal sequences only along the paths of a prefix tree."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor

from dpo_wrapper.prefix_tree.layout import StateKernel, TreeKernel, TreeLayout


class PrefixSharingError(Exception):
    """Raised where a model cannot be run over a tree; the message is the reason, as a part of a sentence."""


def run_along_paths(
    layout: TreeLayout,
    tokens: Sequence[Shaped[Tensor, "r w ..."]],
    causal_fn: Callable[..., Shaped[Tensor, "g n ..."]],
) -> Shaped[Tensor, "r w ..."]:
    """Gather the tokens along the tree's paths, and run `causal_fn` on each group of paths.

    It takes tensors [g n ...] and returns one. For a token on several paths the output on one of them is
    kept: they are all equal.
    """
    shape, outputs = layout.ids.shape, []
    flat = [t.flatten(0, 1) for t in tokens]
    for group in layout.groups:
        gathered = (t.index_select(0, group.flatten()).unflatten(0, group.shape) for t in flat)
        outputs.append(causal_fn(*gathered).flatten(0, 1))
    return torch.cat(outputs).index_select(0, layout.path_index).unflatten(0, shape)


def check_rows(layout: TreeLayout, shape: Sequence[int], part: str = "attention") -> None:
    """PrefixSharingError if a part of a model has other rows than the tree."""
    if (shape := tuple(shape)) != (tree_shape := tuple(layout.ids.shape)):
        raise PrefixSharingError(f"its {part} has rows of shape {shape} for tokens in {tree_shape}")


def note_kernel(layout: TreeLayout, kernel: TreeKernel | StateKernel) -> None:
    """Note what computes a part of a model over a tree, for the probe of the model."""
    if not torch.compiler.is_compiling():
        layout.kernels.add(kernel)
