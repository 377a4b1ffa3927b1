"""Errors about arguments of `DPO`, in the words of the command line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

from dpo_wrapper.training.config import TrainConfig, flag
from dpo_wrapper.training.stopping import TrainingError

NAMES = "|".join(field.name for field in fields(TrainConfig) if "_" in field.name)
ASSIGNMENT = re.compile(rf"\b(reference(?= = '(?:auto|copy|none)')|{NAMES}) = '?(\w+)'?")
NAME = re.compile(rf"(?<![\w./'-])({NAMES})(?![\w./'(-])")


@contextmanager
def flags_in_errors() -> Iterator[None]:
    """The context in which a refusal names the flags of the command, where it would name arguments of `DPO`.

    Also a decorator of functions.
    """
    try:
        yield
    except (TypeError, ValueError, TrainingError) as error:
        if len(error.args) == 1:
            error.args = (name_flags(str(error.args[0])),)
        raise


def name_flags(text: str) -> str:
    """The text with `--share-prefix auto` for `share_prefix = 'auto'`, and flags for other options.

    Options whose name is one word stay as they are, but for values of `reference` that the command knows.
    """
    text = ASSIGNMENT.sub(lambda match: f"{flag(match[1])} {match[2]}", text)
    return NAME.sub(lambda match: flag(match[1]), text)
