"""Checks of ids, masks and options: each raises one sentence before any forward pass."""

import math

import torch
from torch import Tensor

Sides = tuple[Tensor, Tensor]
SIDES = ("preferred_seq", "unpreferred_seq")


def describe_type(value: object) -> str:
    """What a value is, for error messages: "a list of 3"."""
    size = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return "None" if value is None else f"a {type(value).__name__}{size}"


def check_ids(name: str, seq: object) -> Tensor:
    """The ids as int64."""
    if not isinstance(seq, Tensor):
        raise TypeError(f"{name} should be an int tensor, but it is {describe_type(seq)}: use torch.tensor.")
    if seq.is_floating_point() or seq.is_complex() or seq.dtype == torch.bool:
        remedy = "is it a mask?" if seq.dtype == torch.bool else "use .long()."
        raise TypeError(f"{name} should hold token ids (int64), but its dtype is {seq.dtype}: {remedy}")
    shape = tuple(seq.shape)
    if len(shape) != 2:
        raise ValueError(
            f"{name} should have shape (b, n), but its shape is {shape}: for a single row use ids[None]."
        )
    if 0 in shape:
        raise ValueError(
            f"{name} should hold a row and a token, but its shape is {shape}: leave such a batch out."
        )
    if seq.is_meta:
        raise ValueError(f"{name} is on the meta device, where tensors hold no ids: move it to the model's.")
    return seq.long()


def check_mask(name: str, mask: object, like: Tensor, other: str, remedy: str = "") -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} should be a bool tensor, but it is {describe_type(mask)}: use torch.tensor.")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} should be bool, but its dtype is {mask.dtype}: use .bool().")
    if mask.shape != like.shape:
        raise ValueError(
            f"{name} should have the shape of {other}, {tuple(like.shape)}, but its shape is "
            f"{tuple(mask.shape)}: {remedy or 'give one value for each token.'}"
        )
    if mask.device != like.device:
        raise ValueError(f"{name} is on {mask.device} but {other} is on {like.device}: move one of them.")
    return mask


def check_sequences(preferred_seq: object, unpreferred_seq: object) -> Sides:
    left = check_ids(SIDES[0], preferred_seq)
    if unpreferred_seq is None:
        raise TypeError("unpreferred_seq is missing: call dpo(preferred_seq, unpreferred_seq, prompt_mask).")
    right = check_ids(SIDES[1], unpreferred_seq)
    if len(left) != len(right):
        raise ValueError(
            f"each preferred_seq needs an unpreferred_seq, but there are {len(left)} and {len(right)}."
        )
    if left.device != right.device:
        raise ValueError(f"preferred_seq is on {left.device}, unpreferred_seq on {right.device}: move one.")
    return left, right


def check_both_sides(name: str, mask: object, seqs: Sides) -> Sides:
    """One mask for both sides, as wide as the wider of them, or a tuple with one mask for each."""
    if isinstance(mask, (tuple, list)):
        if len(mask) != 2:
            raise ValueError(f"{name} should be one mask or a tuple of two, but it is {describe_type(mask)}.")
        remedy = "the tuple holds the mask of preferred_seq, then that of unpreferred_seq."
        first, second = (check_mask(f"{name}[{k}]", mask[k], seqs[k], SIDES[k], remedy) for k in range(2))
        return first, second
    wider = max(range(2), key=lambda k: seqs[k].shape[1])
    remedy = "one mask serves both sides if it is as wide as the wider, else give a tuple of two."
    mask = check_mask(name, mask, seqs[wider], SIDES[wider], remedy)
    return mask[:, : seqs[0].shape[1]], mask[:, : seqs[1].shape[1]]


def check_prompt_mask(mask: object, seqs: Sides) -> Sides:
    if mask is None:
        raise TypeError("prompt_mask is missing: give a bool mask, True on prompt tokens, perhaps on none.")
    return check_both_sides("prompt_mask", mask, seqs)


def real_tokens(seq: Tensor, pad_id: int | None) -> Tensor:
    """True on real tokens: all, but for the leading and trailing runs of `pad_id` where there is one."""
    if pad_id is None:
        return torch.ones_like(seq, dtype=torch.bool)
    is_token = (seq != pad_id).long()
    has_begun = is_token.cumsum(dim=-1) > 0
    has_more = is_token.flip(-1).cumsum(dim=-1).flip(-1) > 0
    return has_begun & has_more


def check_seq_masks(
    seq_mask: object, per_side: tuple[object, object], seqs: Sides, pad_id: int | None
) -> Sides:
    """The padding masks of both sides, in whichever of the three ways they are given."""
    if seq_mask is not None:
        if per_side != (None, None):
            raise ValueError("give either seq_mask or preferred_seq_mask and unpreferred_seq_mask, not both.")
        return check_both_sides("seq_mask", seq_mask, seqs)
    masks = [
        real_tokens(seq, pad_id) if mask is None else check_mask(f"{side}_mask", mask, seq, side)
        for mask, seq, side in zip(per_side, seqs, SIDES, strict=True)
    ]
    return masks[0], masks[1]


def check_ref_log_probs(ref_log_probs: object, pairs: int, device: torch.device) -> Sides:
    if not (isinstance(ref_log_probs, (tuple, list)) and len(ref_log_probs) == 2):
        raise TypeError(
            f"ref_log_probs should be a tuple (chosen, rejected) of tensors of shape ({pairs},), but it is "
            f"{describe_type(ref_log_probs)}: give what sequence_log_probs says of each side."
        )
    for side, sums in zip(("chosen", "rejected"), ref_log_probs, strict=True):
        name = f"ref_log_probs for {side}"
        if check_pair_values(name, sums, pairs, device).requires_grad:
            raise ValueError(f"{name} should have no gradient, but it requires one: .detach() it.")
    return ref_log_probs[0], ref_log_probs[1]


def check_pair_values(
    name: str,
    values: object,
    pairs: int,
    device: torch.device,
    minimum: float = -math.inf,
    on_cpu: Tensor | None = None,
) -> Tensor:
    """One value for each pair, such as its weight or margin: Float[p], finite, at least `minimum`.

    Given the same values `on_cpu`, the device is not waited for.
    """
    if not (isinstance(values, Tensor) and values.is_floating_point()):
        received = values.dtype if isinstance(values, Tensor) else describe_type(values)
        raise TypeError(f"{name} should be a float tensor, one per pair, but it is {received}: use .float().")
    if values.shape != (pairs,):
        raise ValueError(
            f"{name} should have shape ({pairs},), one per pair, but its shape is {tuple(values.shape)}."
        )
    if values.device != device:
        raise ValueError(f"{name} is on {values.device} but the batch is on {device}: move one of them.")
    known = values if on_cpu is None else on_cpu
    if not (known.isfinite() & (known >= minimum)).all():
        requirement = "finite" if minimum == -math.inf else "finite and not negative"
        raise ValueError(f"{name} should be {requirement}, but one is not: correct or leave out that pair.")
    return values


def check_vocabulary(ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError if a real token is no id of the model."""
    low, high = torch.stack(torch.aminmax(ids)).tolist() if ids.numel() else (0, 0)
    if low < 0 or high >= vocab_size:
        outside = low if low < 0 else high
        raise ValueError(
            f"token ids should be in [0, {vocab_size}), the model's vocabulary, but one is {outside}: "
            "is the tokenizer the model's own, and is padding masked (pad_id or seq_mask)?"
        )


def is_in_range(value: object, low: float, high: float) -> bool:
    """Whether a value is a number with `low <= value <= high`, and finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return low <= value <= high and abs(value) < math.inf


def check_pad_id(pad_id: object) -> int | None:
    if pad_id is not None and (isinstance(pad_id, bool) or not isinstance(pad_id, int)):
        raise TypeError(f"pad_id should be an integer or None, but it is {pad_id!r}.")
    return pad_id


def check_router_aux_loss_coef(coef: object) -> None:
    if coef is not None and not is_in_range(coef, 0.0, math.inf):
        raise ValueError(f"router_aux_loss_coef should be a number from 0, or None, but it is {coef!r}.")


def check_share_prefix(share_prefix: object) -> str | bool:
    if not isinstance(share_prefix, (str, bool)) or share_prefix not in ("auto", True, False):
        raise ValueError(f"share_prefix should be 'auto', True or False, but it is {share_prefix!r}.")
    return share_prefix


def check_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be True or False, but it is {value!r}.")
    return value
