"""A prefix tree as a model takes it: its tokens in rows, and its paths grouped into padded sequences."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from dpo_wrapper.prefix_tree import cpu_attention
from dpo_wrapper.prefix_tree.grouping import group_rows
from dpo_wrapper.prefix_tree.tree import PrefixTree
from dpo_wrapper.tensor_dataclass import TensorDataclass

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Value = TypeVar("Value")

TreeKernel = Literal["flash", "flex", "branches", "model"]
"""What computes plain softmax attention over a tree: FlashAttention, FlexAttention, torch's CPU kernel on
each branch, or the model's own attention along each path."""

StateKernel = Literal["fork", "paths"]
"""What computes layers that carry a state along the sequence: each token once, where a branch begins with the
state at its fork, or the layers as they are along each path."""


@dataclass(frozen=True)
class TreeOptions:
    """How a model takes trees: its widest row, and what computes plain attention and layers with a state.

    `state` is None for a model that has no such layers.
    """

    max_positions: int | None = None
    kernel: TreeKernel = "model"
    min_branch_numel: int = field(default_factory=lambda: cpu_attention.MIN_BRANCH_NUMEL)
    state: StateKernel | None = None


@dataclass(frozen=True)
class TreeLayout(TensorDataclass):
    """The `u` tokens of a tree in `r` rows of width `w`, and the paths on which attention can run.

    Attributes:
        ids: the token ids. They fill the rows one after another; what is left of the last row is padding.
        position: each token's depth in the tree, which is its position in every sequence through it.
        groups: for each group of paths of similar length, the indices of their tokens in the tree. A shorter
            path is padded with its own last token.
        path_index: for each token, its index in the flattened groups, one after another. A token on several
            paths has the index on one of them.
        subtree_end: as in `PrefixTree`.
        branches: the tree's branches, as in `cpu_attention`.
    """

    ids: Int[Tensor, "r w"]
    position: Int[Tensor, "r w"]
    groups: tuple[Int[Tensor, "g n"], ...]
    path_index: Int[Tensor, "rw"]
    subtree_end: Int[Tensor, "u"]
    branches: tuple[cpu_attention.Branch, ...]
    options: TreeOptions

    @classmethod
    def from_tree(cls, tree: PrefixTree, options: TreeOptions) -> "TreeLayout":
        """Lay a tree out in as few rows as `options.max_positions` allows."""
        u = len(tree.ids)
        rows = -(-u // min(u, options.max_positions or u))
        width = -(-u // rows)
        ids, position = (
            F.pad(values, (0, rows * width - u)).view(rows, width) for values in (tree.ids, tree.position)
        )
        groups, path_index = group_rows(tree.leaf_paths(), rows * width)
        branches = cpu_attention.find_branches(tree.position)
        return cls(ids, position, groups, path_index, tree.subtree_end, branches, options)

    @property
    def kernels(self) -> set[TreeKernel | StateKernel]:
        """What has computed attention, and layers that carry a state, over this tree so far."""
        return vars(self).setdefault("_kernels", set())

    def remember(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """What `compute` returns for this layout; it is called once for each key."""
        values = vars(self).setdefault("_values", {})
        if key not in values:
            with torch.inference_mode(False):  # a later pass over the tree may compute gradients
                values[key] = compute()
        return values[key]

    def block_mask(self, window: int | None) -> "BlockMask":
        """The tree's block mask for FlexAttention, computed once for each width of a sliding window."""
        from dpo_wrapper.prefix_tree.flex_attention import create_tree_block_mask

        def compute() -> "BlockMask":
            u, size = len(self.subtree_end), self.position.numel()
            # a token of padding attends to itself
            padding = torch.arange(u + 1, size + 1, device=self.subtree_end.device)
            subtree_end = torch.cat([self.subtree_end, padding])
            return create_tree_block_mask(subtree_end, self.position.flatten(), window)

        return self.remember(("block mask", window), compute)
