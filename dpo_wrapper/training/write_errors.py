"""A run folder that cannot be written, in one sentence with what helps."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dpo_wrapper.data.writable import FULL, find_errno
from dpo_wrapper.training.stopping import TrainingError


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """The context in which errors of writing to a run folder become a TrainingError."""
    try:
        yield
    except TrainingError:
        raise
    except Exception as error:  # that of tokenizers has no class of its own
        number = find_errno(error)
        if number is None and not isinstance(error, (OSError, SafetensorError)):
            raise
        sentence = f"the run should be able to write to {folder}, but "
        if number in FULL:
            sentence += f"it cannot ({error}): make room, and the same command continues it."
        elif not folder.is_dir():
            sentence += (
                "the folder is not there any more: put it back, and the same command continues the run."
            )
        else:
            sentence += f"it cannot ({error}): mend that, and the same command continues it."
        raise TrainingError(sentence) from error
