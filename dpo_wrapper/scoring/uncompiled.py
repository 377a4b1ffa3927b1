"""Keep `torch.compile` out of a method whose work differs from batch to batch."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from dpo_wrapper.models.untraced import untraced


def runs_uncompiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run a module's method as it is where `torch.compile` traces it, and warn once."""

    def run(module: Any, *args: Any, **kwargs: Any) -> Any:
        if "_was_compiled" not in vars(module):
            vars(module)["_was_compiled"] = True
            warnings.warn(
                f"torch.compile should be given parts of the model, but it is given {type(module).__name__}, "
                "which runs uncompiled, for each batch is another prefix tree: compile feed-forward layers.",
                stacklevel=2,
            )
        return method(module, *args, **kwargs)

    untraced_run = untraced(run)

    @functools.wraps(method)
    def wrapper(module: Any, *args: Any, **kwargs: Any) -> Any:
        return (untraced_run if torch.compiler.is_compiling() else method)(module, *args, **kwargs)

    return wrapper


def compile_note(module: Any) -> str:
    """A line that says so if `torch.compile` has met such a method of the module, else nothing."""
    return "\ncompiled: no, for each batch is another tree" if "_was_compiled" in vars(module) else ""
