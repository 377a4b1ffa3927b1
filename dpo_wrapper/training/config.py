"""Settings of a training run: all groups of options together."""

import math
from dataclasses import dataclass, fields
from typing import Any

from dpo_wrapper.training.options.base import Options, flag
from dpo_wrapper.training.options.data import DataOptions
from dpo_wrapper.training.options.lora import LoraOptions
from dpo_wrapper.training.options.loss import LossOptions
from dpo_wrapper.training.options.model import ModelOptions
from dpo_wrapper.training.options.optimization import STAGES, OptimizationOptions, StageName
from dpo_wrapper.training.options.output import OutputOptions

__all__ = ["GROUPS", "STAGES", "StageName", "TrainConfig", "flag"]

GROUPS: dict[str, type[Options]] = {
    "data": DataOptions,
    "model": ModelOptions,
    "lora": LoraOptions,
    "loss": LossOptions,
    "optimization": OptimizationOptions,
    "output": OutputOptions,
}
"""The groups of options by name, in the order in which the command line shows them."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataOptions, ModelOptions, LoraOptions, LossOptions, OptimizationOptions, OutputOptions):
    """Train a language model on human preferences: read them from a file, write the model to a folder.

    Raises:
        ValueError: an option has a value that cannot be, or options contradict each other.
    """

    def __post_init__(self) -> None:
        for group in GROUPS.values():
            check_group: Any = vars(group).get("__post_init__", lambda config: None)
            check_group(self)
        if self.ref_model_sync_steps and self.compares_evaluations:
            name = "keep_best" if self.keep_best else "early_stopping_patience"
            raise ValueError(
                f"{flag(name)} should be given with a reference that does not change, for it compares "
                "evaluations, but --ref-model-sync-steps updates it: leave one of them out."
            )

    @classmethod
    def from_groups(cls, groups: Any) -> "TrainConfig":
        """The settings of an object that has each group of options as an attribute."""
        options: dict[str, Any] = {}
        for name in GROUPS:
            group = getattr(groups, name)
            options |= {field.name: getattr(group, field.name) for field in fields(group)}
        return cls(**options)

    @property
    def is_new_model(self) -> bool:
        return self.adapter is None and super().is_new_model

    def peak_learning_rate(self, stage: StageName, num_steps: int) -> float:
        """The peak learning rate of a stage of so many steps, as it was given or by default."""
        learning_rate = {
            "pretrain": self.pretrain_learning_rate or self.sft_learning_rate,
            "sft": self.sft_learning_rate,
            "dpo": self.learning_rate,
        }[stage]
        if learning_rate is not None:
            return learning_rate
        if self.has_adapter:
            return default_adapter_rate(num_steps) if stage == "dpo" else 2e-4
        if self.is_new_model:
            return 1e-4 if stage == "dpo" else 2e-3
        return 1e-6 if stage == "dpo" else 1e-5


def default_adapter_rate(num_steps: int) -> float:
    """For preferences: 5e-4 up to 20 steps, then less with the square root of their number, down to 5e-5.

    A step of Adam moves each weight by about the rate, whatever the gradient, so that a few steps need a
    higher one to change what the policy writes, and many steps at that rate would leave the reference behind.
    """
    return max(5e-5, 5e-4 * min(1.0, math.sqrt(20 / max(1, num_steps))))
