"""Recipes: YAML files with options of `dpo-wrapper train` under the names of their flags."""

import json
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from dpo_wrapper.training.config import GROUPS, TrainConfig, flag

RECIPE_ENDINGS = (".yaml", ".yml")


def read_recipe(file: Path) -> list[str]:
    """The arguments of the command line that say what a recipe says.

    A value is written as on the command line: true or false for an option without a value, a list for one
    with several, nothing (or null) for the default. A mapping is passed on as JSON.

    Raises:
        ValueError: the file cannot be read, or it holds a key that is no option, or holds one twice.
    """
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        problem = f"the recipe should be a YAML file, but {file} cannot be read"
        raise ValueError(f"{problem} ({reason}): check the path and the file.") from error
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        problem = f"a recipe should have lines like 'learning-rate: 1e-5', but {file} holds something else"
        raise ValueError(f"{problem}: write one option a line.")
    arguments: list[str] = []
    names: set[str] = set()
    for key, value in node.value:
        place = f"{file}, line {key.start_mark.line + 1}"
        name = find_option(str(key.value), place)
        if name in names:
            problem = f"a recipe should name an option once, but it names {key.value} again"
            raise ValueError(f"{place}: {problem}: leave one out.")
        names.add(name)
        arguments += format_arguments(name, value, place)
    return arguments


def find_option(key: str, place: str) -> str:
    """The field of `TrainConfig` that a key names; ValueError with the nearest one if there is none."""
    known = option_types()
    name = ALIASES.get(key, key.replace("-", "_"))
    if name in known:
        return name
    close = get_close_matches(name, known, n=1)
    remedy = f"did you mean {close[0].replace('_', '-')}?" if close else "see dpo-wrapper train --help."
    raise ValueError(f"{place}: a key should be the name of an option, but it is {key}: {remedy}")


def option_types() -> dict[str, Any]:
    """The type of each option, by its name."""
    return {
        name: hint
        for group in GROUPS.values()
        for name, hint in get_type_hints(group).items()
        if name in group.__dataclass_fields__
    }


def find_aliases() -> dict[str, str]:
    """The name of an option for each other name that its flag has."""
    hints = [get_type_hints(group, include_extras=True) for group in GROUPS.values()]
    return {
        alias.lstrip("-"): name
        for group in hints
        for name, hint in group.items()
        for mark in getattr(hint, "__metadata__", ())
        for alias in getattr(mark, "aliases", None) or ()
    }


ALIASES = find_aliases()


def format_arguments(name: str, node: yaml.Node, place: str) -> list[str]:
    """An option and its value as arguments of the command line."""
    if isinstance(node, yaml.MappingNode):
        return [f"{flag(name)}={json.dumps(yaml.safe_load(yaml.serialize(node)))}"]
    if isinstance(node, yaml.SequenceNode):
        if not all(isinstance(item, yaml.ScalarNode) for item in node.value):
            problem = f"{name.replace('_', '-')} should be a list of single values, but it holds others"
            raise ValueError(f"{place}: {problem}: write them one below the other.")
        return [flag(name), *(item.value for item in node.value)]
    if node.tag == "tag:yaml.org,2002:null":
        return []
    if option_types()[name] is not bool:
        is_bool = node.value in ("true", "false") and "bool" in str(option_types()[name])
        return [f"{flag(name)}={node.value.capitalize() if is_bool else node.value}"]
    if node.value.lower() not in ("true", "false"):
        problem = f"{name.replace('_', '-')} should be true or false, but it is {node.value}"
        raise ValueError(f"{place}: {problem}: write one of them.")
    is_set, is_set_by_default = node.value.lower() == "true", TrainConfig.__dataclass_fields__[name].default
    return [] if is_set == is_set_by_default else [flag(name if is_set else f"no_{name}")]


def format_recipe(config: TrainConfig) -> str:
    """A recipe of all options of a run, by groups; those that are null have their default."""
    return "\n".join(format_group(config, name) for name in GROUPS)


def format_group(config: TrainConfig, group: str) -> str:
    options = {
        field.name.replace("_", "-"): as_plain(getattr(config, field.name)) for field in fields(GROUPS[group])
    }
    lines = yaml.safe_dump(options, sort_keys=False, allow_unicode=True, width=10**6)
    return f"# {group}\n{lines}"


def as_plain(value: Any) -> Any:
    """A value of an option as YAML has it."""
    if isinstance(value, tuple):
        return [as_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
