"""A lock on a run folder, so that no two runs write to it at the same time."""

from pathlib import Path
from typing import IO

from accelerate.utils import get_int_from_env

from dpo_wrapper.data.whole_files import try_lock
from dpo_wrapper.data.writable import refuse_folder

LOCK_FILE = "run.lock"
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Where launchers say the number of a process."""


def is_first_process() -> bool:
    """Whether this is the first process of a run, or the only one; known before the processes have met."""
    return get_int_from_env(RANKS, 0) <= 0


def lock_run(folder: Path) -> IO[bytes] | None:
    """Lock a run folder for this process, until the file that is returned is closed.

    The lock ends with the process, however that ends. Worker processes do not inherit it, so that they do not
    keep it for a process that was killed. None in all processes of a run but the first.

    Raises:
        ValueError: another process has the lock, or the folder cannot be written.
    """
    if not is_first_process():
        return None
    try:
        file = (folder / LOCK_FILE).open("ab")
    except OSError as error:
        raise refuse_folder(folder, error) from error
    if not try_lock(file):
        file.close()
        raise ValueError(
            f"--out should be a folder that no other run writes to, but one is writing to {folder} now: wait "
            "for its end, or name a new folder."
        )
    return file
