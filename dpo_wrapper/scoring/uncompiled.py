"""Keep `torch.compile` out of a method whose work differs from batch to batch."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch


def runs_uncompiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run a module's method as it is where `torch.compile` traces it, and warn once.

    `torch.compiler.disable` does so as well, but loads the compiler when the method is defined.
    """

    def run(module: Any, *args: Any, **kwargs: Any) -> Any:
        if "_was_compiled" not in vars(module):
            vars(module)["_was_compiled"] = True
            warnings.warn(
                f"torch.compile should be given parts of the model, but it is given {type(module).__name__}, "
                "which runs uncompiled, for each batch is another prefix tree: compile feed-forward layers.",
                stacklevel=2,
            )
        return method(module, *args, **kwargs)

    @functools.wraps(method)
    def wrapper(module: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(run)(module, *args, **kwargs)
        return method(module, *args, **kwargs)

    return wrapper


def compile_note(module: Any) -> str:
    """A line that says so if `torch.compile` has met such a method of the module, else nothing."""
    return "\ncompiled: no, for each batch is another tree" if "_was_compiled" in vars(module) else ""
