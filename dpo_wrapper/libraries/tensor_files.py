"""What safetensors leaves open about the files that it writes."""

from pathlib import Path


def apply_umask(file: Path) -> None:
    """Give a file the mode of any new one, by the user's umask; safetensors lets its owner alone read it."""
    other = file.with_name(f"{file.name}.mode")
    other.touch()
    file.chmod(other.stat().st_mode)
    other.unlink()
