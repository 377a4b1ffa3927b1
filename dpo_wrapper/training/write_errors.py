"""A run folder that cannot be written, in one sentence with what helps."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dpo_wrapper.training.stopping import TrainingError

FULL = (errno.ENOSPC, errno.EDQUOT)
OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How errors of libraries in Rust end (safetensors, tokenizers), some of which have no class of their own."""


def find_errno(error: BaseException) -> int | None:
    """The operating system's number of an error, if it is one of files."""
    if "No space left" in str(error):  # also in the report of torch.distributed.checkpoint
        return errno.ENOSPC
    match = OS_ERROR.search(str(error))
    return int(match[1]) if match else getattr(error, "errno", None)


def refuse_folder(folder: Path, error: OSError) -> ValueError:
    """What is wrong with a run folder before the run."""
    remedy = "make room, or name another" if find_errno(error) in FULL else "name another"
    return ValueError(
        f"--out should be a folder that can be written, but {folder} cannot ({error.strerror}): {remedy}."
    )


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
