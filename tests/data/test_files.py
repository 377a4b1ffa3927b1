"""Every kind of file, folder and pattern that rows come in."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_wrapper.data import read_examples

ROWS = [
    {"prompt": f"Zwölf, {k}?\n", "chosen": 'ja, "so"', "rejected": "nein\tnein", "label_source": f"x{k}"}
    for k in range(3)
]
pa = pytest.importorskip("pyarrow")


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def compress_zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return bytes(sink.getvalue())


def as_arrow(rows: list[dict[str, Any]], open_writer: Callable[..., Any]) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with open_writer(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow.parquet

    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


FILES = {
    "a.jsonl": as_lines, "a.ndjson": as_lines, "a.jsonl.gz": lambda rows: gzip.compress(as_lines(rows)),
    "a.ndjson.bz2": lambda rows: bz2.compress(as_lines(rows)),
     "a.jsonl.xz": lambda rows: lzma.compress(as_lines(rows)),
    "a.jsonl.zst": lambda rows: compress_zstd(as_lines(rows)),
     "misnamed.jsonl": lambda rows: compress_zstd(as_lines(rows)),
    "a.json": lambda rows: json.dumps(rows, indent=2).encode(),
    "pretty.json": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows).encode(),
    "commas.json": lambda rows: ",\n".join(json.dumps(row, indent=1) for row in rows).encode(),
    "columns.json": lambda rows: json.dumps({key: [row[key] for row in rows] for key in rows[0]}).encode(),
    "a.csv": lambda rows: as_table(rows, ","), "a.tsv": lambda rows: as_table(rows, "\t"),
    "a.csv.gz": lambda rows: gzip.compress(as_table(rows, ",")),
     "a.tsv.zst": lambda rows: compress_zstd(as_table(rows, "\t")),
    "file.arrow": lambda rows: as_arrow(rows, pa.ipc.new_file), "stream.arrow": lambda rows: as_arrow(rows,
     pa.ipc.new_stream),
    "a.parquet": as_parquet,
}  # fmt: skip


def texts(paths: Any, **options: Any) -> list[tuple[str, ...]]:
    return [
        (str(example.prompt), *map(str, example.completions))
        for example in read_examples(paths, **options).examples
    ]


WANTED = [(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS]


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name](ROWS))
    read = read_examples(tmp_path / name)
    assert texts(tmp_path / name) == WANTED
    assert read.unused_columns == {"label_source": 3} and read.num_rows == 3 and read.forms == {"pair": 3}
    assert all(example.source.startswith(f"{name}, ") for example in read.examples)


def test_several_files_folders_and_patterns(tmp_path: Path) -> None:
    for k, row in enumerate(ROWS):
        folder = tmp_path / f"part{k}"
        folder.mkdir()
        (folder / f"{'train' if k else 'test'}-0000{k}-of-00003.jsonl").write_bytes(as_lines([row]))
        (folder / "README.md").write_text("not rows")
    shards = [str(tmp_path / f"part{k}") for k in (2, 0, 1)]
    assert texts(tmp_path) == WANTED
    assert texts(shards) == [WANTED[2], WANTED[0], WANTED[1]]
    assert texts(str(tmp_path / "part[12]" / "*.jsonl")) == WANTED[1:]
    assert texts(str(tmp_path / "**" / "*.jsonl")) == WANTED
    assert [example.split for example in read_examples(tmp_path).examples] == ["test", "train", "train"]


def test_data_sets_that_datasets_has_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(ROWS)
    one.select([2, 0, 1]).save_to_disk(str(tmp_path / "one"))
    assert texts(tmp_path / "one") == [WANTED[2], WANTED[0], WANTED[1]]
    parts = datasets.DatasetDict({"train_prefs": one.select([0, 1]), "test_prefs": one.select([2])})
    parts.save_to_disk(str(tmp_path / "parts"))
    read = read_examples(tmp_path / "parts")
    assert [example.split for example in read.examples] == ["train", "train", "test"]
    assert texts(tmp_path / "parts", split="test_prefs") == WANTED[2:]
    with pytest.raises(
        ValueError, match=r"split should be one of train_prefs, test_prefs, but it is 'no': name one"
    ):
        read_examples(tmp_path / "parts", split="no")


def test_the_name_of_a_data_set_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[str] = []

    def load(name: str) -> Any:
        asked.append(name)
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts("some-org/prefs.v1") == WANTED and asked == ["some-org/prefs.v1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"prompt,chosen,rejected\nQ,A\n",
         r"a.csv, row 1: the row should have 3 cells as the first row, but"),
        ("a.csv", b"", r"a.csv: the file should be a table, but reading it gives"),
        ("a.arrow", b"no arrow at all", r"a.arrow: the file should be Arrow, but reading it gives"),
        ("a.jsonl.zst", compress_zstd(as_lines(ROWS))[:-20],
         r"a.jsonl.zst: the (packed data should be whole|file should be)"),
        ("a.jsonl.xz", lzma.compress(as_lines(ROWS))[:-20],
         r"a.jsonl.xz: the packed data should be whole, but"),
        ("a.jsonl.bz2", bz2.compress(as_lines(ROWS))[:-20],
         r"a.jsonl.bz2: the packed data should be whole, but"),
        ("a.json", b'{"prompt": "Q",\n "chosen": "A", "rejected": "B"}\n{"prompt": ',
         r"a.json, line 3: the file should be JSON, but from"),
    ],
)  # fmt: skip
def test_broken_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_examples(tmp_path / name, on_error="raise")
    assert "\n" not in str(caught.value)


def test_columns_that_no_form_needs_are_not_read(tmp_path: Path) -> None:
    import pyarrow.parquet

    far = pa.array([10**15] * 3, pa.timestamp("s"))  # beyond Python's dates
    table = pa.Table.from_pylist(ROWS).append_column("created", far)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == WANTED
    assert set(read_examples(tmp_path / "a.parquet").unused_columns) == {"created", "label_source"}
