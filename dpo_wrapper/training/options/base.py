"""What the groups of options have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dpo_wrapper.data.config import flag

__all__ = ["Options", "flag"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """A group of options, checked when it is made."""

    def check(self, name: str, is_valid: Callable[[Any], bool], expected: str) -> None:
        """ValueError if an option has a value, but not a valid one."""
        value = getattr(self, name)
        if value is not None and not is_valid(value):
            raise ValueError(f"{flag(name)} should be {expected}, but it is {value}: give another value.")
