"""Files that cannot be read say what is wrong with them, in one sentence."""

import gzip
import json
import os
import sys
from pathlib import Path

import pytest

from dpo_wrapper.data import Fields, read_examples

GOOD = {"prompt": "Q", "chosen": "A", "rejected": "B"}
LINE = json.dumps(GOOD)
LINES = "the line should be one JSON object, but it is"
EMPTY = ": the file should have rows, but it is empty"
LISTED = (
    "the file should hold a list of objects, or an object with one list under 'data' or 'rows', but it "
    "holds an object with"
)


BAD: list[tuple[str, bytes, str, str]] = [  # name, content, message after the name, remedy
    ("a.jsonl", b"", EMPTY, "add rows or name another"),
    ("a.jsonl", b"\n  \n", EMPTY, "add rows"),
    ("a.json", b" \n", EMPTY, "add rows"),
    ("a.json", b"[]", EMPTY, "add rows"),
    ("a.jsonl.gz", gzip.compress(b"", mtime=0), EMPTY, "add rows"),
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
        ", line 1: the text should be UTF-8, but byte 1 of the line is 0xff",
        "save the text as UTF-8",
    ),
    (
        "a.jsonl",
        f"{LINE}\n".encode() + b'{"prompt": "caf\xe9"}',
        ", line 2: the text should be UTF-8, but byte 16 of the line is 0xe9",
        "save the text as UTF-8",
    ),
    (
        "a.json",
        f"[{LINE},\n".encode() + b'{"prompt": "caf\xe9"}]',
        ", line 2: the text should be UTF-8, but byte 16 of the line is 0xe9",
        "save the text as UTF-8",
    ),
    (
        "a.json",
        b'[{"prompt": 1},\n {"a" 2}]',
        ", line 2, column 7: the file should be JSON, but it is broken JSON (Expecting ':' delimiter)",
        "correct it",
    ),
    ("a.json", f"{LINE}\n{{".encode(), f", line 2, column 2: {LINES} broken JSON", "correct it"),
    (
        "a.json",
        b'"text"',
        f": {LISTED.removesuffix('an object with')}'text'",
        "write the rows as one list",
    ),
    ("a.json", b'{"train": [], "test": []}', f": {LISTED} 'train', 'test'", "write the rows as one list"),
    ("a.json", b'{"data": [], "rows": []}', f": {LISTED} 'data', 'rows'", "write the rows as one list"),
    (
        "a.json",
        b"[1]",
        ", row 1: a row should be an object with prompt and completions, but it is the number 1",
        "write one object per row",
    ),
    (
        "a.jsonl.gz",
        gzip.compress(f"{LINE}\n".encode() * 50, mtime=0)[:-12],
        ": the packed data should be whole, but the file is truncated",
        "fetch or write it again",
    ),
    (
        "a.json",
        gzip.compress(f"[{LINE}]".encode(), mtime=0)[:30],
        ": the packed data should be whole, but the file is truncated",
        "fetch or write it again",
    ),
    (
        "a.jsonl.gz",
        b"\x1f\x8b\x08\x00rubbish, not deflated",
        ": the file should be readable, but reading it gives '",
        "fetch or write",
    ),
    (
        "a.jsonl.gz",
        b"\x1f\x8brubbish, long enough",
        ": the file should be readable, but reading it gives '",
        "fetch or write",
    ),
    (
        "a.parquet",
        LINE.encode(),
        ": the file should be Parquet, but reading it gives '",
        "write or fetch it again",
    ),
    ("a.parquet", b"", ": the file should be Parquet, but reading it gives '", "write or fetch it again"),
]


@pytest.mark.parametrize(("name", "content", "start", "remedy"), BAD)
def test_bad_file(tmp_path: Path, name: str, content: bytes, start: str, remedy: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_examples(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(name + start), message
    assert remedy in message.rpartition(": ")[2] and message.endswith(".")
    assert "\n" not in message and len(message) < 400


@pytest.mark.parametrize("content", [gzip.compress(LINE.encode() * 9, mtime=0)[:-9], b""])
def test_a_broken_file_is_no_row_to_skip(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"the file is truncated|it is empty"):
        read_examples(tmp_path / "a.jsonl", on_error="skip")


def test_an_empty_parquet_file(tmp_path: Path) -> None:
    import pyarrow as pa

    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: the file should have rows, but it is empty: add rows"):
        read_examples(tmp_path / "a.parquet")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"the path should be a file, but '.*no.jsonl' does not exist: check the path"
    ):
        read_examples(tmp_path / "no.jsonl")
    (tmp_path / "pairs.jsonl").touch()
    with pytest.raises(ValueError, match=r"pair.jsonl' does not exist: did you mean .*pairs.jsonl\?"):
        read_examples(tmp_path / "pair.jsonl")
    (tmp_path / "pairs.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"the folder should hold files of rows, but '.*' holds none: name a"
    ):
        read_examples(tmp_path)
    with pytest.raises(
        ValueError, match=r"the pattern should match files, but '.*.jsonl' matches none: check"
    ):
        read_examples(tmp_path / "*.jsonl")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINE)
    (tmp_path / "a.jsonl").chmod(0)
    with pytest.raises(
        ValueError,
        match=r"a.jsonl: the file should be readable, but reading it gives .*: check its permissions",
    ):
        read_examples(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.txt", "a.gz", "a", "json", "a.parquet.gz"])
def test_unknown_endings(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(LINE)
    with pytest.raises(
        ValueError, match=r"the ending of the file should say its format, but the file is '.*'"
    ) as caught:
        read_examples(tmp_path / name)
    assert ": name one that ends in .jsonl, .ndjson, .json, .csv, .tsv (each may be packed" in str(
        caught.value
    )


def test_arguments() -> None:
    with pytest.raises(
        TypeError, match="paths should be the path of a file or a list of paths, but it is null: name a file"
    ):
        read_examples(None)  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match="paths should be the path of a file or a list of paths, but it is a list of 1"
    ):
        read_examples([3])  # type: ignore[list-item]
    with pytest.raises(
        ValueError, match="paths should hold at least one file, but it is an empty list: name a file"
    ):
        read_examples([])
    with pytest.raises(
        ValueError, match="on_error should be 'raise' or 'skip', but it is 'ignore': choose one"
    ):
        read_examples("a.jsonl", Fields(), on_error="ignore")  # type: ignore[arg-type]


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'dpo-wrapper\[train\]'"):
        read_examples(path)
