"""Prefix trees: sequences that share a prefix are computed as a tree in which each token stands once.

`PrefixTree` holds the tokens, `TreeLayout` what a model needs to run over them, and `attend_along_paths` and
`attend_with_kernel` compute attention over a layout. Nothing here knows any model.
"""

from dpo_wrapper.prefix_tree.attention import PrefixSharingError, attend_along_paths, attend_with_kernel
from dpo_wrapper.prefix_tree.layout import TreeKernel, TreeLayout, TreeOptions
from dpo_wrapper.prefix_tree.tree import PrefixTree

__all__ = [
    "PrefixSharingError", "PrefixTree", "TreeKernel", "TreeLayout", "TreeOptions", "attend_along_paths",
    "attend_with_kernel",
]  # fmt: skip
