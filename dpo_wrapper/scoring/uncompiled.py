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
        if not was_compiled(module):
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


def was_compiled(module: Any) -> bool:
    """Whether `torch.compile` has met a method of the module that runs uncompiled."""
    return bool(vars(module).get("_was_compiled"))
