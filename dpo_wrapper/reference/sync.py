"""A reference that follows the policy from time to time: TR-DPO, Gorbatovski 2024 (arXiv 2404.09656)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dpo_wrapper.reference.reference import Reference
from dpo_wrapper.validation import is_in_range


@torch.no_grad()
def sync_reference(reference: Reference, policy: nn.Module, alpha: float) -> None:
    """`ref <- alpha * policy + (1 - alpha) * ref`, for all weights that the two do not share.

    Buffers of floats are mixed as well; others (counters) are taken over. ValueError for a reference without
    weights of the policy's shapes.
    """
    if not (is_in_range(alpha, 0, 1) and alpha > 0):
        raise ValueError(f"alpha should be above 0 and at most 1, but it is {alpha!r}.")
    module = reference.module
    if module is None:
        raise ValueError(
            f"the reference should have weights of its own to update, but it is {reference.description}: use "
            "reference = 'copy', which copies the weights that train."
        )
    pairs = match_tensors(module.named_parameters(), policy.named_parameters())
    pairs += match_tensors(module.named_buffers(), policy.named_buffers())
    for old, new in pairs:
        if old is new:
            continue
        if alpha == 1 or not old.is_floating_point():
            old.copy_(new)
        else:
            dtype = torch.promote_types(old.dtype, torch.float32)
            old.copy_(old.to(dtype).lerp(new.to(old.device, dtype), alpha))
    if reference.cache is not None:
        reference.cache.values.clear()


def match_tensors(
    old: Iterable[tuple[str, Tensor]], new: Iterable[tuple[str, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """Tensors of the same names; ValueError unless all names and shapes are the same."""
    before, after = dict(old), dict(new)
    different = [name for name in before.keys() | after.keys() if name not in before or name not in after]
    different = different or [name for name in before if before[name].shape != after[name].shape]
    if different:
        raise ValueError(
            f"the reference should be of the policy's architecture, but {min(different)} differs, so the two "
            "cannot be mixed: use reference = 'copy'."
        )
    return [(before[name], after[name]) for name in before]
