"""Keep functions out of what `torch.compile` traces, without loading the compiler where it is not used."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have `torch.compile` call a function as it is, and compile what is around it.

    `torch.compiler.disable` does so as well, but loads the compiler, in seconds, as the function is defined.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call
