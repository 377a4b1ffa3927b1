"""A reference that follows the policy from time to time: TR-DPO, Gorbatovski 2024 (arXiv 2404.09656)."""

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
    old, new = named_tensors(module), named_tensors(policy)
    different = {(name, t.shape) for name, t in old.items()} ^ {(name, t.shape) for name, t in new.items()}
    if different:
        raise ValueError(
            f"the reference should be of the policy's architecture, but {min(different)[0]} differs, so the "
            "two cannot be mixed: use reference = 'copy'."
        )
    for name, target in old.items():
        source = new[name]
        if target is source:
            continue
        if alpha == 1 or not target.is_floating_point():
            target.copy_(source)
        else:
            dtype = torch.promote_types(target.dtype, torch.float32)
            target.copy_(target.to(dtype).lerp(source.to(target.device, dtype), alpha))
    if reference.cache is not None:
        reference.cache.values.clear()


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())
