"""The command line of `dpo-wrapper compare`: what is compared, and the options that all runs share."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dpo_wrapper.libraries.tyro_cli import parse_command_line
from dpo_wrapper.losses import parse_losses
from dpo_wrapper.training.command_line import MARKERS, OptionGroups, parse_recipe
from dpo_wrapper.training.config import GROUPS, TrainConfig, flag
from dpo_wrapper.training.options.data import DataOptions
from dpo_wrapper.training.recipe import RECIPE_ENDINGS

PROGRAM = "dpo-wrapper compare"

SHARED_OPTIONS = (*(field.name for field in fields(DataOptions)), "out", "seed", "resume")
"""Options that say what runs are compared on, and where they are."""


@dataclass(frozen=True, kw_only=True)
class CompareArguments(OptionGroups):
    """Train with several losses or recipes on the same data, and say what differs beyond chance.

    dpo-wrapper compare [RECIPE.yaml ...] [OPTIONS]: each loss of --losses, or each recipe, is trained with
    each seed; the options of `dpo-wrapper train` hold for all of them. --out is a folder for the runs and for
    report.html.
    """

    losses: tuple[str, ...] = ()
    """The losses to compare, each as --loss takes it: --losses sigmoid 'simpo(beta=2.0)' ipo. With recipes,
    each of them is trained with each loss."""
    seeds: int = 3
    """Number of runs of each: with --seed, --seed + 1 and so on. All evaluate on the same rows."""
    judge: str | None = None
    """What says whose answers are better, the policy's or its reference's, as --judge of dpo-wrapper
    evaluate: a function like rules.py:score, a reward model, or implicit:RUN. By default nothing does."""
    num_samples: int | None = None
    """Number of eval prompts that are answered for the judge; by default 100."""


@dataclass(frozen=True)
class Contestant:
    """What is compared with others.

    Attributes:
        name: of the contestant, which names of files begin with.
        config: of its runs, but for seed and folder.
    """

    name: str
    config: TrainConfig


@dataclass(frozen=True)
class Comparison:
    """Contestants, seeds, the folder for all of them, and what judges their answers."""

    contestants: tuple[Contestant, ...]
    seeds: tuple[int, ...]
    out: Path
    judge: str | None = None
    num_samples: int | None = None


def parse_arguments(args: Sequence[str]) -> Comparison:
    """The comparison that the arguments after `dpo-wrapper compare` ask for.

    Raises:
        SystemExit: help was asked for.
        ValueError: the arguments or a recipe cannot be read, options contradict each other, or there is
            nothing to compare.
    """
    args = list(args)
    recipes: list[Path] = []
    while args and Path(args[0]).suffix in RECIPE_ENDINGS:
        recipes.append(Path(args.pop(0)))
    contestants: list[Contestant] = []
    for recipe in recipes or (None,):
        defaults: dict[str, Any] = {}
        if recipe is not None:
            groups = {name: getattr(parse_recipe(recipe), name) for name in GROUPS}
            defaults["default"] = CompareArguments(**groups)
        arguments = parse_command_line(CompareArguments, PROGRAM, args, config=MARKERS, **defaults)
        config = TrainConfig.from_groups(arguments)
        contestants += list_contestants(config, arguments.losses, recipe)
    config = contestants[0].config
    check_contestants(contestants, arguments)
    seeds = tuple(config.seed + k for k in range(arguments.seeds))
    return Comparison(tuple(contestants), seeds, config.out, arguments.judge, arguments.num_samples)


def list_contestants(config: TrainConfig, losses: Sequence[str], recipe: Path | None) -> list[Contestant]:
    """A contestant for each loss, or the recipe itself where none is given."""
    stem = [] if recipe is None else [recipe.stem]
    if not losses:
        return [Contestant("-".join(stem) or name_loss(config.loss), config)]
    if recipe is None and config.loss != TrainConfig.__dataclass_fields__["loss"].default:
        raise ValueError(
            f"--losses should be given without --loss, but that is {config.loss}: name it in --losses."
        )
    parsed: dict[str, str] = {}
    for loss in losses:
        same = parsed.setdefault(repr(parse_losses(loss)), loss)
        if same is not loss:
            raise ValueError(f"--losses should differ, but {same} and {loss} are one: leave one out.")
    return [Contestant("-".join([*stem, name_loss(loss)]), replace(config, loss=loss)) for loss in losses]


def name_loss(loss: str) -> str:
    """A loss as a part of a file's name: `simpo(beta=2.0)` is simpo-beta-2.0."""
    return re.sub(r"[^a-z0-9.]+", "-", loss.lower()).strip("-")


def check_contestants(contestants: Sequence[Contestant], arguments: CompareArguments) -> None:
    """Raise ValueError unless the contestants can be compared."""
    names = [one.name for one in contestants]
    if len(names) < 2:
        raise ValueError(
            f"there should be at least two losses or recipes to compare, but there is {names[0]} alone: give "
            "--losses, or recipes."
        )
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"losses and recipes should differ in their names, but {double} is there twice: leave one out, "
            "or rename a recipe."
        )
    if arguments.seeds < 1:
        raise ValueError(f"--seeds should be at least 1, but it is {arguments.seeds}: give another value.")
    first = contestants[0].config
    for name in SHARED_OPTIONS:
        values = [getattr(one.config, name) for one in contestants]
        different = next((value for value in values if value != values[0]), None)
        if different is not None:
            raise ValueError(
                f"{flag(name)} should be the same for all that is compared, but it is {values[0]} and "
                f"{different}: give {flag(name)} on the command line."
            )
    if arguments.num_samples is not None and arguments.judge is None:
        raise ValueError(
            "--num-samples is of answers that a judge reads, but none is named: give --judge too."
        )
    if first.resume:
        raise ValueError("--resume should be left out of a comparison: the same command continues it.")
