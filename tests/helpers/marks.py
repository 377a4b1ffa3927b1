"""Parameters of which only a few belong to the fast tests."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def mark_slow_except(fast: Container[Any], values: Iterable[Any]) -> list[Any]:
    """Values of `pytest.mark.parametrize`, those that are not in `fast` marked slow.

    Where a test has several parameters, a value is a tuple.
    """
    return [
        value
        if value in fast
        else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for value in values
    ]
