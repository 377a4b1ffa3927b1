"""Whether a folder can be written, and what is wrong if it cannot."""

import errno
import os
import re
import tempfile
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How errors of libraries in Rust end (safetensors, tokenizers), some of which have no class of their own."""


def find_errno(error: BaseException) -> int | None:
    """The operating system's number of an error, if it is one of files."""
    if "No space left" in str(error):  # also in the report of torch.distributed.checkpoint
        return errno.ENOSPC
    match = OS_ERROR.search(str(error))
    return int(match[1]) if match else getattr(error, "errno", None)


def refuse_folder(folder: Path, error: Exception) -> ValueError:
    """What is wrong with the folder that --out names."""
    number = find_errno(error)
    reason = error if number is None else os.strerror(number)
    remedy = "make room, or name another" if number in FULL else "name another"
    return ValueError(
        f"--out should be a folder that can be written, but {folder} cannot ({reason}): {remedy}."
    )


def check_writable(folder: Path) -> None:
    """Raise ValueError if `folder` is no folder, or cannot be written or created. Nothing is left behind."""
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        if not existing.is_dir():
            raise ValueError(f"--out should be a folder, but {existing} is a file: name a new folder.")
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise refuse_folder(folder, error) from error
