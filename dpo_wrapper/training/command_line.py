"""The command line of `dpo-wrapper train`: options in groups, with the defaults of a recipe or without."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from dpo_wrapper.libraries.tyro_cli import parse_command_line
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.options.data import DataOptions
from dpo_wrapper.training.options.lora import LoraOptions
from dpo_wrapper.training.options.loss import LossOptions
from dpo_wrapper.training.options.model import ModelOptions
from dpo_wrapper.training.options.optimization import OptimizationOptions
from dpo_wrapper.training.options.output import OutputOptions
from dpo_wrapper.training.recipe import RECIPE_ENDINGS, format_recipe, read_recipe

PROGRAM = "dpo-wrapper train"
MARKERS: Any = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)


@dataclass(frozen=True, kw_only=True)
class OptionGroups:
    """The options of a training run, in groups."""

    data: DataOptions
    model: ModelOptions
    lora: LoraOptions
    loss: LossOptions
    optimization: OptimizationOptions
    output: OutputOptions


@dataclass(frozen=True, kw_only=True)
class TrainArguments(OptionGroups):
    """Train a language model on human preferences: read them from a file, write the model to a folder.

    dpo-wrapper train RECIPE.yaml [OPTIONS] takes its defaults from a recipe, whose keys are the names of the
    options: `learning-rate: 1e-5`.
    """

    print_config: bool = False
    """Print all options with their values, as a recipe, and train nothing."""
    plan: bool = False
    """Print what the run would take (memory, tokens, time), from three measured steps, and write nothing."""


def parse_arguments(args: Sequence[str]) -> tuple[TrainConfig, bool]:
    """The settings that the arguments after `dpo-wrapper train` ask for: those of a recipe, then its own.

    The second value says whether the run should only be planned.

    Raises:
        SystemExit: nothing should be trained.
        ValueError: the arguments or the recipe cannot be read, or options contradict each other.
    """
    args = list(args)
    defaults: Any = {}
    if args and not args[0].startswith("-"):
        recipe = Path(args.pop(0))
        if recipe.suffix not in RECIPE_ENDINGS:
            problem = f"the first argument should be an option or a recipe, but it is {recipe}"
            raise ValueError(f"{problem}: name a .yaml file, or write --data {recipe}.")
        defaults["default"] = parse_recipe(recipe)
    arguments = parse_command_line(TrainArguments, PROGRAM, args, config=MARKERS, **defaults)
    config = TrainConfig.from_groups(arguments)
    if arguments.print_config:
        print(format_recipe(config), end="")
        sys.exit(0)
    return config, arguments.plan


def parse_recipe(file: Path) -> TrainArguments:
    """What a recipe sets; data that it does not name is missing still."""
    options = read_recipe(file)
    has_data = any(option.partition("=")[0] == "--data" for option in options)
    if not has_data:
        options += ["--data", "named on the command line"]
    try:
        arguments: TrainArguments = parse_command_line(TrainArguments, PROGRAM, options, config=MARKERS)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if not has_data:
        object.__setattr__(arguments.data, "data", tyro.MISSING)
    return arguments
