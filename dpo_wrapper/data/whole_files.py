"""Files that are written completely or not at all, and hashes of their contents."""

import hashlib
import os
from pathlib import Path


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
