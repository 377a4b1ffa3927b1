"""Prefix trees: sequences that share a prefix are computed as a tree in which each token stands once.

`PrefixTree` holds the tokens, and `TreeLayout` what a model needs to run over them. `attention` computes
attention over a layout, `recurrence` layers that carry a state, and `run_along_paths` whatever knows ordinary
sequences only. Nothing here knows any model.
"""

from dpo_wrapper.prefix_tree.attention import attend_along_paths, attend_with_kernel
from dpo_wrapper.prefix_tree.layout import StateKernel, TreeKernel, TreeLayout, TreeOptions
from dpo_wrapper.prefix_tree.paths import PrefixSharingError, note_kernel, run_along_paths
from dpo_wrapper.prefix_tree.recurrence import convolve_over_tree, scan_over_tree, shift_over_tree
from dpo_wrapper.prefix_tree.tree import PrefixTree

__all__ = [
    "PrefixSharingError", "PrefixTree", "StateKernel", "TreeKernel", "TreeLayout", "TreeOptions",
    "attend_along_paths", "attend_with_kernel", "convolve_over_tree", "note_kernel", "run_along_paths",
    "scan_over_tree", "shift_over_tree",
]  # fmt: skip
