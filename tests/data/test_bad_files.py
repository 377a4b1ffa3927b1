"""Files that cannot be read say what is wrong with them, in one sentence."""

import gzip
import json
import os
import sys
from pathlib import Path

import pytest

from dpo_wrapper.data import Fields, read_rows

GOOD = {"prompt": "Q", "chosen": "A", "rejected": "B"}
LINE = json.dumps(GOOD)
LINES = "expected one JSON object per line, got"
LISTED = "expected a list of objects, or an object with one list under 'data' or 'rows', got an object with"


BAD: list[tuple[str, bytes, str, str]] = [  # name, content, message after the name, remedy
    ("a.jsonl", b"", ": expected rows, got an empty file", "add rows or name another file"),
    ("a.jsonl", b"\n  \n", ": expected rows, got an empty file", "add rows"),
    ("a.json", b" \n", ": expected rows, got an empty file", "add rows"),
    ("a.json", b"[]", ": expected rows, got an empty file", "add rows"),
    ("a.jsonl.gz", gzip.compress(b"", mtime=0), ": expected rows, got an empty file", "add rows"),
    (
        "a.jsonl",
        LINE.encode() + b'\n{"prompt": "Q" "chosen": 1}',
        f", line 2, column 16: {LINES} broken JSON (Expecting ',' delimiter)",
        "correct it",
    ),
    (
        "a.jsonl",
        b"[\n" + LINE.encode() + b"\n]",
        f", line 1, column 2: {LINES} broken JSON",
        "or name the file .json if it is one JSON list",
    ),
    ("a.jsonl", b"9" * 5000, f", line 1: {LINES} JSON beyond limits", "correct it"),
    ("a.jsonl", b"[" * 200_000, ", line 1", "correct it"),
    (
        "a.jsonl",
        LINE.encode("utf-16"),
        ", line 1: expected UTF-8, got byte 0xff at byte 1 of the line",
        "save the text as UTF-8",
    ),
    (
        "a.jsonl",
        f"{LINE}\n".encode() + b'{"prompt": "caf\xe9"}',
        ", line 2: expected UTF-8, got byte 0xe9 at byte 16 of the line",
        "save the text as UTF-8",
    ),
    (
        "a.json",
        f"[{LINE},\n".encode() + b'{"prompt": "caf\xe9"}]',
        ", line 2: expected UTF-8, got byte 0xe9 at byte 16 of the line",
        "save the text as UTF-8",
    ),
    (
        "a.json",
        b'[{"prompt": 1},\n {"a" 2}]',
        ", line 2, column 7: expected JSON, got broken JSON (Expecting ':' delimiter)",
        "correct it",
    ),
    ("a.json", f"{LINE}\n{{".encode(), f", line 2, column 2: {LINES} broken JSON", "correct it"),
    ("a.json", b'"text"', ": expected a list of objects, got 'text'", "write such a list"),
    ("a.json", b'{"train": [], "test": []}', f": {LISTED} 'train', 'test'", "write the rows as one list"),
    ("a.json", b'{"data": [], "rows": []}', f": {LISTED} 'data', 'rows'", "write the rows as one list"),
    (
        "a.json",
        b"[1]",
        ", row 1: expected an object with the two sides of a pair, got the number 1",
        "write one object per row",
    ),
    (
        "a.jsonl.gz",
        gzip.compress(f"{LINE}\n".encode() * 50, mtime=0)[:-12],
        ": expected whole gzip data, got a truncated file",
        "fetch or write the file again",
    ),
    (
        "a.json",
        gzip.compress(f"[{LINE}]".encode(), mtime=0)[:30],
        ": expected whole gzip data, got a truncated file",
        "fetch or write the file again",
    ),
    (
        "a.jsonl.gz",
        b"\x1f\x8b\x08\x00rubbish, not deflated",
        ": expected a readable file, got",
        "fetch or write",
    ),
    ("a.jsonl.gz", b"\x1f\x8brubbish, long enough", ": expected a readable file, got", "fetch or write"),
    ("a.parquet", LINE.encode(), ": expected a Parquet file, got '", "write or fetch the file again"),
    ("a.parquet", b"", ": expected a Parquet file, got '", "write or fetch the file again"),
]


@pytest.mark.parametrize(("name", "content", "start", "remedy"), BAD)
def test_bad_file(tmp_path: Path, name: str, content: bytes, start: str, remedy: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_rows(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(name + start), message
    assert remedy in message.rpartition("; ")[2]
    assert "\n" not in message and len(message) < 400


@pytest.mark.parametrize("content", [gzip.compress(LINE.encode() * 9, mtime=0)[:-9], b""])
def test_a_broken_file_is_no_row_to_skip(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"truncated file|empty file"):
        read_rows(tmp_path / "a.jsonl", on_error="skip")


def test_an_empty_parquet_file(tmp_path: Path) -> None:
    import pyarrow as pa

    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: expected rows, got an empty file; add rows"):
        read_rows(tmp_path / "a.parquet")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected a file, got '.*no.jsonl', which does not exist; check the path"
    ):
        read_rows(tmp_path / "no.jsonl")
    with pytest.raises(ValueError, match=r"got the folder '.*'; name the file, one that ends in .jsonl"):
        read_rows(tmp_path)
    (tmp_path / "b.jsonl").write_text(LINE)
    with pytest.raises(ValueError, match=r"got the folder '.*'; name the file, for instance '.*b.jsonl'"):
        read_rows(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINE)
    (tmp_path / "a.jsonl").chmod(0)
    with pytest.raises(ValueError, match=r"a.jsonl: expected a readable file, got .*; check its permissions"):
        read_rows(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.csv", "a.gz", "a", "json", "a.parquet.gz"])
def test_unknown_endings(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(LINE)
    with pytest.raises(ValueError, match=r"expected a file whose ending says its format, got '.*'") as caught:
        read_rows(tmp_path / name)
    assert "; name one that ends in .jsonl, .json (either with .gz) or .parquet" in str(caught.value)


def test_arguments() -> None:
    with pytest.raises(
        TypeError, match="expected the path of a file or a list of paths, got null; name a file"
    ):
        read_rows(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected the path of a file or a list of paths, got a list of 1"):
        read_rows([3])  # type: ignore[list-item]
    with pytest.raises(
        ValueError, match="expected at least one file, got an empty list of paths; name a file"
    ):
        read_rows([])
    with pytest.raises(ValueError, match="expected on_error 'raise' or 'skip', got 'ignore'; choose one"):
        read_rows("a.jsonl", Fields(), on_error="ignore")  # type: ignore[arg-type]


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'dpo-wrapper\[train\]'"):
        read_rows(path)
