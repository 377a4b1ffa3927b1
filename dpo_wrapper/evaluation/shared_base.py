"""A reference that differs from its policy in its adapter alone takes the policy's own base."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_wrapper.pretrained import PretrainedModel
from dpo_wrapper.pretrained.adapter import (
    ADAPTER_WEIGHTS,
    import_peft,
    is_adapter_folder,
    read_adapter_config,
    without_deprecations,
)
from dpo_wrapper.reference.frozen_copy import frozen_copy


def has_same_base(folder: str, other: str) -> bool:
    """Whether two folders hold adapters of one form on one base, by PEFT's configurations."""
    are_adapters = is_adapter_folder(folder) and is_adapter_folder(other)
    if not (are_adapters and (Path(other) / ADAPTER_WEIGHTS).is_file()):
        return False
    return read_form(folder) == read_form(other)


def read_form(folder: str) -> dict[str, Any]:
    """An adapter's configuration with lists in one order, since PEFT writes sets."""
    config = read_adapter_config(folder)
    return {name: sorted(map(str, v)) if isinstance(v, list) else v for name, v in config.items()}


def copy_with_adapter(policy: PretrainedModel, folder: str) -> PretrainedModel:
    """The policy with another adapter, which `has_same_base`; the weights of the base are the same memory.

    The policy's adapter trains, and its base does not.
    """
    from safetensors.torch import load_file

    copied = frozen_copy(policy.model)
    with without_deprecations():
        import_peft().set_peft_model_state_dict(copied, load_file(Path(folder) / ADAPTER_WEIGHTS))
    assert policy.adapter is not None
    return replace(policy, model=copied, adapter=replace(policy.adapter, folder=str(Path(folder).absolute())))
