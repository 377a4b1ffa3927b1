"""Lines and progress bars, which read well in a terminal and in a file."""

import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

CONTROL_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
SHOWN_CONTROLS = "\n\t\u200c\u200d"
"""Line breaks, and what joins letters and emoji or keeps them apart."""


def replace_controls(text: str) -> str:
    """The text without what a terminal would obey, such as escape sequences, or what reorders a line."""
    return "".join(
        "\ufffd" if unicodedata.category(char) in CONTROL_CATEGORIES and char not in SHOWN_CONTROLS else char
        for char in text
    )


def print_line(text: str) -> None:
    """Print a line above the progress bars, at once also where the output is a file or a pipe."""
    from tqdm import tqdm

    tqdm.write(text)
    sys.stdout.flush()


def hide_library_bars() -> None:
    """Keep the progress bars of transformers out of a file or a pipe."""
    if not sys.stderr.isatty() and find_spec("transformers"):
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


@contextmanager
def hide_sharing_warnings() -> Iterator[None]:
    """Leave the warning that prefixes are not shared out, of which `Trainer` prints a line.

    And FSDP's of layers that return a view: the layers of no model here write into those of others.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        warnings.filterwarnings("ignore", message="prefixes are not shared")
        yield


def create_progress_bar(
    label: str, unit: str = "", total: int | None = None, *, is_main_process: bool = True, **options: Any
) -> Any:
    """The main process's progress bar in a terminal, or its label where there is nothing to count.

    In a file nothing of it is seen.
    """
    from tqdm import tqdm

    is_disabled = not (is_main_process and sys.stderr.isatty())
    options |= {"mininterval": 0.2, "dynamic_ncols": True, "disable": is_disabled}
    if total is None:
        options["bar_format"] = "{desc} …"
    return tqdm(desc=label, unit=unit, total=total, **options)
