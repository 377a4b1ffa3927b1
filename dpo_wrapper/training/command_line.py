"""The command line of `dpo-wrapper train`: its options in groups, with a recipe of defaults or without."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tyro

from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.options.data import DataOptions
from dpo_wrapper.training.options.lora import LoraOptions
from dpo_wrapper.training.options.loss import LossOptions
from dpo_wrapper.training.options.model import ModelOptions
from dpo_wrapper.training.options.optimization import OptimizationOptions
from dpo_wrapper.training.options.output import OutputOptions


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Train a language model on human preferences: read them from a file, write the model to a folder."""

    data: DataOptions
    model: ModelOptions
    lora: LoraOptions
    loss: LossOptions
    optimization: OptimizationOptions
    output: OutputOptions


def parse_arguments(args: Sequence[str]) -> TrainConfig:
    """The settings that the arguments after `dpo-wrapper train` ask for.

    Raises:
        SystemExit: the arguments cannot be read, which tyro has explained, or ask for help.
        ValueError: options contradict each other.
    """
    options: Any = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    return TrainConfig.from_groups(
        tyro.cli(TrainArguments, prog="dpo-wrapper train", args=list(args), config=options)
    )
