"""Which files a name stands for, and how they are opened."""

import bz2
import glob
import gzip
import io
import lzma
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any, cast

PathLike = str | os.PathLike[str]

JSON_LINES = (".jsonl", ".ndjson")
TEXT_ENDINGS = (*JSON_LINES, ".json", ".csv", ".tsv")
TABLE_ENDINGS = (".parquet", ".arrow")
PACKINGS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard"}
PACKED_ENDINGS = tuple(PACKINGS)
KNOWN_ENDINGS = (
    ".jsonl, .ndjson, .json, .csv, .tsv (each may be packed: .gz, .bz2, .xz, .zst), .parquet or .arrow"
)

_SHARD = re.compile(r"(.+?)-\d+-of-\d+")


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        path: a file, a folder that `datasets` has saved, or the name of a data set on the hub.
        name: what messages call it.
        kind: the ending of a file without those of packing, 'saved' or 'hub'.
        split: the split that the names of sharded files tell.
    """

    path: str
    name: str
    kind: str
    split: str | None = None


def find_sources(paths: Sequence[PathLike]) -> list[Source]:
    """The files that the paths stand for: files, folders of files, patterns, and names on the hub.

    Raises:
        ValueError: nothing is there, or a file's ending says no known format.
    """
    sources = [source for path in paths for source in _find(str(path))]
    names = [source.name for source in sources]
    # The file's name reads best, unless another file of the same name is read as well.
    return [s if names.count(s.name) == 1 else Source(s.path, s.path, s.kind, s.split) for s in sources]


def _find(path: str) -> list[Source]:
    if os.path.isdir(path):
        return _find_in_folder(Path(path))
    if os.path.exists(path):
        return [_as_source(Path(path))]
    if glob.has_magic(path):
        found = sorted(glob.glob(path, recursive=True))
        if not found:
            raise ValueError(f"the pattern should match files, but '{path}' matches none: check the pattern.")
        return [source for file in found for source in _find(file)]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.endswith(
        (*TEXT_ENDINGS, *TABLE_ENDINGS, *PACKED_ENDINGS)
    ):
        return [Source(path, path, "hub")]
    folder = Path(path).parent
    siblings = {file.stem: file for file in folder.iterdir()} if folder.is_dir() else {}
    close = get_close_matches(Path(path).stem, siblings, n=1, cutoff=0.75)
    remedy = f"did you mean {siblings[close[0]]}?" if close else "check the path."
    raise ValueError(f"the path should be a file, but '{path}' does not exist: {remedy}")


def _find_in_folder(folder: Path) -> list[Source]:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return [Source(str(folder), folder.name, "saved")]
    files = sorted(file for file in folder.rglob("*") if file.is_file() and _kind(file.name) is not None)
    if not files:
        problem = f"the folder should hold files of rows, but '{folder}' holds none"
        raise ValueError(f"{problem}: name a folder with files that end in {KNOWN_ENDINGS}.")
    return [_as_source(file) for file in files]


def _as_source(file: Path) -> Source:
    kind = _kind(file.name)
    if kind is None:
        problem = f"the ending of the file should say its format, but the file is '{file}'"
        raise ValueError(f"{problem}: name one that ends in {KNOWN_ENDINGS}.")
    shard = _SHARD.fullmatch(file.name.split(".")[0])
    return Source(str(file), file.name, kind, shard and shard[1])


def _kind(name: str) -> str | None:
    """The ending of a file's name without those of packing; None if it is not known."""
    lower = name.lower()
    for ending in PACKED_ENDINGS:
        if lower.endswith(ending):
            lower = lower.removesuffix(ending)
            return next((known for known in TEXT_ENDINGS if lower.endswith(known)), None)
    return next((known for known in (*TEXT_ENDINGS, *TABLE_ENDINGS) if lower.endswith(known)), None)


def open_packed(raw: IO[bytes]) -> IO[bytes]:
    """A file of bytes, unpacked as its first bytes ask for, whatever its name says."""
    start = raw.read(6)
    raw.seek(0)
    if start.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if start.startswith(b"BZh"):
        return cast(IO[bytes], bz2.BZ2File(raw))
    if start.startswith(b"\xfd7zXZ\x00"):
        return cast(IO[bytes], lzma.LZMAFile(raw))
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        stream: Any = import_pyarrow().CompressedInputStream(raw, "zstd")
        return cast(IO[bytes], io.BufferedReader(stream))
    return raw


def check_packed(file: IO[bytes], name: str) -> None:
    """Raise ValueError for a file of JSON that is not packed, although its name says so, nor JSON."""
    packing = next((words for ending, words in PACKINGS.items() if name.lower().endswith(ending)), None)
    start = file.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    if packing and start and not start.startswith((b"{", b"[")):
        problem = f"the file should be packed with {packing}, as its name says, but it is not"
        raise ValueError(f"{name}: {problem}: fetch or write it again.")


def import_pyarrow() -> Any:
    """pyarrow, or ImportError that names the extra to install."""
    try:
        import pyarrow
        import pyarrow.csv
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("reading this file needs pyarrow: pip install 'dpo-wrapper[train]'.") from error
    return pyarrow
