"""Which reference a policy gets, from the options of `DPO`."""

from typing import Literal, get_args

import torch
from torch import nn

from dpo_wrapper.models.adapters import LORA_FACTOR
from dpo_wrapper.reference.frozen_copy import frozen_copy
from dpo_wrapper.reference.reference import (
    AdapterDisabled,
    CachedReference,
    FrozenModel,
    ModelReference,
    NoReference,
    Reference,
)
from dpo_wrapper.reference.shared_weights import memory_key
from dpo_wrapper.scoring.scorer import Scorer

ReferenceKind = Literal["auto", "copy", "adapter", "none"]
KINDS = get_args(ReferenceKind)


def build_reference(
    kind: ReferenceKind | nn.Module | CachedReference,
    policy_scorer: Scorer,
    is_needed: bool,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    per_token: bool,
    has_cache: bool,
) -> Reference:
    """The reference of a policy, as the options of `DPO` say; TypeError or ValueError if they do not fit.

    `is_needed` says whether a loss needs one, and `per_token` whether the log-prob of each token is needed.
    """
    policy = policy_scorer.language_model.model
    if kind not in KINDS and not isinstance(kind, (nn.Module, CachedReference)):
        raise ValueError(f"reference should be a module or one of {', '.join(KINDS)}, but it is {kind!r}.")
    if kind == "auto":
        is_fresh = is_needed and not is_offloaded(policy) and has_fresh_adapter(policy)
        kind = "none" if not is_needed else "adapter" if is_fresh else "copy"
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"reference_dtype should be a torch dtype of floats, but it is {dtype!r}.")
    for option, value in (("reference_dtype", dtype), ("reference_device", device)):
        if value is not None and kind != "copy":
            which = repr(kind) if isinstance(kind, str) else "given"
            raise ValueError(
                f"{option} is for reference = 'copy', but it is {which}: leave it out, and convert or "
                "move a module of your own by module.to(...)."
            )
    if has_cache and (kind == "none" or isinstance(kind, CachedReference)):
        what = "there is none" if kind == "none" else "its log-probs are there already"
        problem = f"cache_ref_log_probs should be left out where the reference computes nothing ({what})"
        raise ValueError(f"{problem}, but it is True: leave it out, or give another reference.")
    if isinstance(kind, CachedReference):
        if per_token and not kind.per_token:
            raise ValueError(
                "ld_alpha needs the reference's log-prob of each token, but the cache holds sums: make it "
                "with precompute_ref_log_probs(..., per_token = True)."
            )
        return kind
    if kind == "none":
        return NoReference()

    reference: ModelReference
    if isinstance(kind, nn.Module):
        check_trains_nothing_of(policy, kind)
        reference = FrozenModel(reference_scorer(kind, policy_scorer), policy)
    elif is_offloaded(policy):
        raise ValueError(
            "the policy's weights should be in memory to make a reference of them, but they are offloaded: "
            "load the policy without offloading, or give reference = module."
        )
    elif kind == "copy":
        fixed_device = None if device is None else parse_device(device)
        copied = frozen_copy(policy, dtype, fixed_device)
        reference = FrozenModel(reference_scorer(copied, policy_scorer), policy, fixed_device)
    elif has_fresh_adapter(policy):
        reference = AdapterDisabled(policy_scorer)
    else:
        raise ValueError(
            "reference = 'adapter' switches a fresh PEFT LoRA adapter off, but this policy has none, or one "
            "that is already trained, or trains other weights as well: use reference = 'copy'."
        )
    if has_cache:
        reference.enable_cache(per_token)
    return reference


def follow_policy(reference: Reference, policy_scorer: Scorer) -> Reference:
    """The same reference beside a policy that was wrapped or replaced; ValueError if it cannot be kept."""
    if not isinstance(reference, ModelReference):
        return reference
    policy = policy_scorer.language_model.model
    followed: ModelReference
    if isinstance(reference, FrozenModel):
        check_trains_nothing_of(policy, reference.model)
        followed = FrozenModel(reference_scorer(reference.model, policy_scorer), policy, reference.device)
    elif hasattr(policy, "disable_adapter"):
        followed = AdapterDisabled(policy_scorer)
    else:
        raise ValueError(
            "policy_model should have an adapter, since the reference is the policy with its adapter off, "
            "but it has none: make a new DPO."
        )
    followed.cache, followed.versions = reference.cache, reference.versions
    followed.max_cached_length = reference.max_cached_length
    return followed


def reference_scorer(model: nn.Module, policy_scorer: Scorer) -> Scorer:
    return Scorer(model, policy_scorer.impl, policy_scorer.share_prefix, policy_scorer)


def check_trains_nothing_of(policy: nn.Module, reference: nn.Module) -> None:
    """ValueError if the policy trains a parameter of the reference."""
    trained = {memory_key(p) for p in policy.parameters() if p.requires_grad}
    if reference is policy or any(memory_key(p) in trained for p in reference.parameters()):
        raise ValueError(
            "the given reference shares trained parameters with the policy and would follow it: "
            "use reference = 'copy'."
        )


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate brings weights of the model from elsewhere for each pass."""
    hooks = [hook for m in model.modules() if (hook := vars(m).get("_hf_hook")) is not None]
    return any(getattr(hook, "offload", False) for h in hooks for hook in (h, *getattr(h, "hooks", ())))


def has_fresh_adapter(policy: nn.Module) -> bool:
    """Whether all that trains is a PEFT LoRA adapter that does nothing yet."""
    if not (hasattr(policy, "peft_config") and hasattr(policy, "disable_adapter")):
        return False
    # PEFT starts factor B at zero, for embeddings A; DoRA trains magnitudes beside the factors
    zeros = [p for name, p in policy.named_parameters() if "lora_B." in name or "lora_embedding_A." in name]
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    is_lora_alone = all(LORA_FACTOR.search(name) for name in trained)
    return bool(zeros) and is_lora_alone and not any(p.detach().any() for p in zeros)


def parse_device(device: object) -> torch.device:
    """A device of this machine by its name, with its index as tensors have it; else ValueError."""
    try:
        return torch.empty(0, device=torch.device(device)).device  # type: ignore[call-overload]
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"reference_device should be a device of this machine, like 'cpu', but it is {device!r} "
            f"({reason.rstrip('.')}): name another one, or leave it out."
        ) from error
