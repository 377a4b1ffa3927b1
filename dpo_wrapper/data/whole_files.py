"""Files that are written completely or not at all, or by one process alone, and hashes of their contents."""

import hashlib
import os
from pathlib import Path
from typing import IO


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file completely or not at all, also where the machine loses its power."""
    unfinished = file.with_name(f"{file.name}.new")
    if isinstance(content, bytes):
        unfinished.write_bytes(content)
    else:
        unfinished.write_text(content, encoding="utf-8")
    flush_to_disk(unfinished)
    os.replace(unfinished, file)


def flush_to_disk(file: Path) -> None:
    """Wait until the disk holds what has been written to a file."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def try_lock(stream: IO[bytes]) -> bool:
    """Lock an open file for this process, until it is closed; False if another process has the lock.

    The lock ends with the process, however that ends. Processes that are started do not inherit it. True as
    well where the system or the file system has no such locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return True
    return True


def hash_file(file: Path) -> str:
    """128 bits of a hash of a file's content, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_text(text: str) -> str:
    """128 bits of a hash of a text, in hexadecimal."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
