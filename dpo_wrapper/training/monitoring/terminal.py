"""Lines and progress bars, which read well in a terminal and in a file."""

import sys
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm


def print_line(text: str) -> None:
    """Print a line above the progress bars, at once also where the output is a file or a pipe."""
    tqdm.write(text)
    sys.stdout.flush()


def create_progress_bar(accelerator: Accelerator, label: str, unit: str, **options: Any) -> tqdm:
    """The main process's progress bar in a terminal. In a file nothing of it is seen."""
    is_disabled = not (accelerator.is_main_process and sys.stderr.isatty())
    return tqdm(desc=label, unit=unit, mininterval=0.2, dynamic_ncols=True, disable=is_disabled, **options)
