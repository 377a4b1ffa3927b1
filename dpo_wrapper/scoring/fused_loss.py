"""Groups of tokens that meet in one value of a loss, for the early gradients of a trained head.

`token_log_probs(..., fused_loss=FusedLoss(fn, groups))` computes gradients in forward, group by group.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from dpo_wrapper.batches.sequences import ScoredSequences, unique_pairs
from dpo_wrapper.log_probs import FusedLoss


def connected_components(links: Int[Tensor, "k 2"], count: int) -> Int[Tensor, "n"]:
    """A number for each of `count` things, the same for all that are connected by links (union-find)."""
    parent = list(range(count))

    def find_root(k: int) -> int:
        while parent[k] != k:
            parent[k] = k = parent[parent[k]]
        return k

    ones, others, _ = unique_pairs(*links.unbind(dim=1))
    for one, other in zip(ones.tolist(), others.tolist(), strict=True):
        first, second = sorted((find_root(one), find_root(other)))
        parent[second] = first
    return torch.tensor([find_root(k) for k in range(count)], device=links.device)


def group_tokens(sequences: ScoredSequences, links: Int[Tensor, "k 2"]) -> Int[Tensor, "t"]:
    """The group of each scored token, where linked sequences, such as the sides of a pair, meet in a loss."""
    return connected_components(links, len(sequences.length))[sequences.row]


def fused_loss_of_entries(
    fused_loss: FusedLoss, entry: Int[Tensor, "t"], entry_on_cpu: Int[Tensor, "t"], entries: int
) -> FusedLoss:
    """The same loss as a function of a tree's entries; `entry` is the index of each scored token's entry.

    Groups are on the CPU, where nothing waits for a device.
    """
    groups = fused_loss.groups
    if groups is not None:
        groups, on_cpu = groups.cpu(), entry_on_cpu
        owner = groups.new_zeros(entries).scatter(0, on_cpu, groups)  # one of the groups that share an entry
        is_shared = groups != owner[on_cpu]
        links = torch.stack([groups[is_shared], owner[on_cpu[is_shared]]], dim=1)
        groups = connected_components(links, int(groups.max()) + 1 if len(groups) else 0)[owner]

    def fn(log_probs: Tensor) -> Tensor:  # which may be on the device of the head
        return fused_loss.fn(log_probs.to(entry.device).index_select(0, entry))

    return FusedLoss(fn, groups)
