"""A reference that follows the policy from time to time: TR-DPO, Gorbatovski 2024 (arXiv 2404.09656)."""

import torch
from torch import Tensor, nn

from dpo_wrapper.losses import is_number
from dpo_wrapper.reference.reference import Reference


def check_alpha(alpha: object, name: str = "alpha") -> float:
    if not (is_number(alpha) and 0 < alpha <= 1):
        raise ValueError(f"{name} should be above 0 and at most 1, but it is {alpha!r}.")
    return float(alpha)


@torch.no_grad()
def sync(reference: Reference, policy: nn.Module, alpha: float) -> None:
    """`ref <- alpha * policy + (1 - alpha) * ref`, for all weights that the two do not share.

    Buffers of floats are mixed as well; others (counters) are taken over.

    Raises:
        ValueError: there is no reference with weights of its own, or they are not of the policy's shapes.
    """
    module = model_of(reference)
    pairs = [*matched(module.named_parameters, policy.named_parameters)]
    pairs += matched(module.named_buffers, policy.named_buffers)
    for old, new in pairs:
        if old is new:
            continue
        if alpha == 1 or not old.is_floating_point():
            old.copy_(new)
        else:
            wide = torch.promote_types(old.dtype, torch.float32)
            old.copy_(old.to(wide).lerp(new.to(old.device, wide), alpha))
    if reference.memory is not None:
        reference.memory.clear()


def model_of(reference: Reference) -> nn.Module:
    """The reference's own model; ValueError with a remedy if it has none."""
    if reference.module is not None:
        return reference.module
    if reference.adapter_of is not None:
        raise ValueError(
            "the reference is the policy with its adapter off and has no weights to update: use "
            "reference = 'copy', which copies the adapter alone."
        )
    why = "log-probs computed before cannot be updated" if reference.cached is not None else "there is none"
    raise ValueError(f"a reference with weights is expected, but {why}: use reference = 'copy'.")


def matched(old: object, new: object) -> list[tuple[Tensor, Tensor]]:
    """Tensors of the same names; ValueError unless all names and shapes are the same."""
    before, after = dict(old()), dict(new())  # type: ignore[operator]
    differ = [n for n in before.keys() | after.keys() if n not in before or n not in after]
    differ = differ or [n for n in before if before[n].shape != after[n].shape]
    if differ:
        raise ValueError(
            f"the reference is of another architecture than the policy ({min(differ)} differs), so the "
            "two cannot be mixed: use reference = 'copy'."
        )
    return [(before[name], after[name]) for name in before]
