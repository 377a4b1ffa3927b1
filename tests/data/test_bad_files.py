"""Files with faults: each has its sentence with the place, and loses no good row when rows are skipped."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from dpo_wrapper.data import Fields, read_examples

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROW = {"prompt": "Q", "chosen": "A", "rejected": "B"}
LINE = json.dumps(ROW).encode() + b"\n"
PRETTY = json.dumps(ROW, indent=1).encode()
HEAD = b"prompt,chosen,rejected\n"
LINES = "the line should be one JSON object, but it is"
CELLS = "the row should have 3 cells as the first row, but it has"
PACKED = "the packed data should be whole, but the file is truncated: fetch or write it again."


def document(**values: Any) -> bytes:
    return json.dumps(values).encode()


# name, content, the sentence after the name, how many rows remain when bad ones are skipped (None: no file)
BAD: list[tuple[str, bytes, str, int | None]] = [
    ("a.jsonl", LINE + b"\x00\n" + LINE,
     f", line 2, column 1: {LINES} broken JSON (Expecting value): correct it.", 2),
    ("a.jsonl", LINE + b"// note\n" + LINE, f", line 2, column 1: {LINES} broken JSON (Expecting value)", 2),
    ("a.jsonl", LINE + b"{'prompt': 'Q'}\n",
     f", line 2, column 2: {LINES} broken JSON (Expecting property name", 1),
    ("a.jsonl", LINE + LINE.strip() + LINE, f", line 2, column 48: {LINES} broken JSON (Extra data)", 1),
    ("a.jsonl", LINE + LINE[:20] + b"\n" + LINE,
     f", line 2, column 17: {LINES} broken JSON (Unterminated", 2),
    ("a.jsonl", LINE + b'{"prompt": NULL}\n', f", line 2, column 12: {LINES} broken JSON (Expecting value)",
     1),
    ("a.jsonl", LINE + b'"Q"\n' + LINE,
     ", line 2: a row should be an object with prompt and completions, but it is 'Q'", 2),
    ("a.jsonl", LINE + b"[1, 2]\n" + LINE,
     ", line 2: a row should be an object with prompt and completions, but", 2),
    ("a.jsonl", LINE + b"null\n" + LINE,
     ", line 2: a row should be an object with prompt and completions, but it is null", 2),
    ("a.jsonl", PRETTY,
     f", line 1, column 2: {LINES} broken JSON (Expecting property name enclosed in double quotes): "
     "correct it, or name the file .json if its objects go over several lines.", 0),
    ("a.jsonl", LINE + "caf\u00e9\n".encode("latin-1"),
     ", line 2: the text should be UTF-8, but byte 4 of the line is 0xe9", 1),
    ("a.jsonl", b'{"prompt": "Q", "chosen": NaN, "rejected": "B"}\n' + LINE,
     ", line 1, field 'chosen': the value should be "
     "text or a list of messages, but it is the number nan", 1),
    ("a.jsonl.gz", gzip.compress(LINE * 99, mtime=0)[:-9], f": {PACKED}", None),
    ("a.jsonl.bz2", bz2.compress(LINE * 99)[:-9], f": {PACKED}", None),
    ("a.jsonl.xz", lzma.compress(LINE * 99)[:-9], f": {PACKED}", None),
    ("a.jsonl.zst", b"\x28\xb5\x2f\xfdrubbish",
     ": the file should be readable, but reading it gives '", None),
    ("a.jsonl.gz", b"\0\x01\xff", ": the file should be packed with gzip, as its name says, but it",
     None),
    ("a.json.zst", b"<html>", ": the file should be packed with Zstandard, as its name says, but it",
     None),
    ("a.json", PRETTY + b"\n" + b'{"prompt":\n',
     ", line 6: the file should be JSON, but from here on it is broken JSON (", None),
    ("a.json", b"[" + LINE.strip() + b",]",
     ", line 1, column 50: the file should be JSON, but it is broken JSON (", None),
    ("a.json", document(one=ROW), ": the file should hold a list of objects, or an object with one list",
     None),
    ("a.json", document(prompt=["Q", "R"], chosen=["A"], rejected=["B", "C"]),
     ": the columns should have as many rows, but "
     "'prompt' has 2, 'chosen' has 1, 'rejected' has 2: write the same number of each.", None),
    ("a.json", b"[" + LINE + b", 3]",
     ", row 2: a row should be an object with prompt and completions, but it is the number 3", 1),
    ("a.json", b"7",
     ": the file should hold a list of objects, or an object with one list under 'data' or 'rows', but",
      None),
    ("a.csv", b"",
     ": the file should be a table, but reading it gives 'Empty CSV file': write or fetch it again.", None),
    ("a.csv", HEAD, ": the file should have rows, but it is empty: add rows or name another.", None),
    ("a.csv", HEAD + b"Q,A,B\nQ,A\nR,A,B\n", f", row 2: {CELLS} 2: correct the commas and quotes.", 2),
    ("a.csv", HEAD + b"Q,A,B\nQ,A, or B,C\n", f", row 2: {CELLS} 4: correct the commas and quotes.", 1),
    ("a.csv", HEAD + b'Q,A,B\n"Q,A,B\n', f", row 2: {CELLS} 1: correct the commas and quotes.", 1),
    ("a.tsv", HEAD.replace(b",", b"\t") + b"Q\tA\tB\nQ\tA\n",
     f", row 2: {CELLS} 2: correct the tabs and quotes.", 1),
    ("a.csv", HEAD + "Q,caf\u00e9,B\n".encode("latin-1"),
     ", line 2: the text should be UTF-8, but byte 6 of the line is 0xe9", None),
    ("a.csv", b"prompt,chosen,chosen\nQ,A,B\n",
     ": the columns should have different names, but 'chosen' stands twice", None),
    ("a.csv", HEAD + b"Q,,B\nQ,A,B\n",
     ", row 1, field 'chosen': the value should be text or a list of messages, but it is null", 1),
    ("a.csv", HEAD + b",A,B\nQ,A,B\n",
     ", row 1, field 'prompt': the prompt should not be empty, but it is null", 1),
    ("a.csv", b"prompt;chosen;rejected\nQ;A;B\n",
     ": the columns should be separated by commas, but the first line has ';' instead "
     "('prompt;chosen;rejected'): write it with commas.", None),
    ("a.tsv", HEAD + b"Q,A,B\n",
     ": the columns should be separated by tabs, but the first line has ',' instead", None),
    ("a.csv", b"Prompt,chosen,Rejected\nQ,A,B\n",
     ", row 1, field 'rejected': a row should have this field, but it has 'chosen', 'Prompt', 'Rejected': "
     "name its columns with --columns prompt=Prompt rejected=Rejected.", 0),
    ("a.csv", b"prompt,chosen,rejected,weight\nQ,A,B,heavy\nQ,A,B,2\n",
     ", row 1, field 'weight': the value should be a", 1),
    ("a.csv", b"prompt,completion,label\nQ,A,maybe\nQ,A,1\n",
     ", row 1, field 'label': the label should be true or", 1),
    ("a.parquet", b"PAR1PAR1", ": the file should be Parquet, but reading it gives '", None),
    ("a.arrow", b"ARROW1", ": the file should be Arrow, but reading it gives '", None),
    ("a.arrow", b"", ": the file should be Arrow, but reading it gives '", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "sentence", "kept"), BAD, ids=range(len(BAD)))
def test_bad_file(tmp_path: Path, name: str, content: bytes, sentence: str, kept: int | None) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_examples(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(name + sentence), message
    assert message.endswith(".") and "\n" not in message and len(message) < 350
    assert " should " in message and ", but " in message and ": " in message
    if kept is None:
        with pytest.raises(ValueError, match=r"should .*, but "):
            read_examples(tmp_path / name, on_error="skip")
    else:
        read = read_examples(tmp_path / name, on_error="skip")
        assert len(read.examples) == kept
        assert len(read.errors) == read.num_rows - kept > 0 and str(read.errors[0]) == message


def test_a_file_that_is_not_packed_is_read_whatever_its_name_says(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"\xef\xbb\xbf\n" + LINE)
    assert len(read_examples(tmp_path / "a.jsonl.gz").examples) == 1


def test_the_header_of_a_table_may_be_quoted_and_stand_behind_empty_lines(tmp_path: Path) -> None:
    """Cells of such columns are text, even where all of them look like numbers."""
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbf\r\n"prompt",chosen,"rejected"\r\n1,02,"3"\r\n')
    (example,) = read_examples(tmp_path / "a.csv").examples
    assert (example.prompt, example.completions) == ("1", ("02", "3"))


def test_rows_keep_their_numbers_behind_torn_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(HEAD + b'A\n"Q\n2",A,B\nB\nC\nR,A,B\nD\n')
    read = read_examples(path, on_error="skip")
    assert [example.source for example in read.examples] == ["a.csv, row 2", "a.csv, row 5"]
    assert [error.source for error in read.errors] == [f"a.csv, row {k}" for k in (1, 3, 4, 6)]
    assert read.examples[0].prompt == "Q\n2" and read.num_rows == 6


def test_cut_parquet_and_a_column_that_stands_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({name: [text] for name, text in ROW.items()}), path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"^a\.parquet: the file should be Parquet, but reading it gives"):
        read_examples(path)
    table = pa.Table.from_arrays(
        [pa.array(["Q"]), pa.array(["A"]), pa.array(["B"])], ["prompt", "chosen", "chosen"]
    )
    pq.write_table(table, path)
    with pytest.raises(ValueError, match=r"but 'chosen' stands twice: rename one of the two\.$"):
        read_examples(path)


def test_columns_that_pandas_writes(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "prompt": "R"}]
    columns = {name: {str(k): row[name] for k, row in enumerate(rows)} for name in ROW}
    for content in (columns, {name: [row[name] for row in rows] for name in ROW}):
        (tmp_path / "a.json").write_text(json.dumps(content))
        assert [example.prompt for example in read_examples(tmp_path / "a.json").examples] == ["Q", "R"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt": "question"},
            r"line 1, field 'question': a row should have this field, but it has 'prompt'",
        ),
        ({"chosen": "best"}, r"line 1, field 'best': a row should have this field, but it has 'prompt'"),
        ({"rejected": "x.y"}, r"line 1, field 'x.y': a row should have this field, but it has 'prompt'"),
        (
            {"weight": "w"},
            r"a column that is named should be in the data, but no row has 'w' for weight: correct",
        ),
        ({"split": "fold"}, r"a column that is named should be in the data, but no row has 'fold' for split"),
        ({"tools": "functions"}, r"named should be in the data, but no row has 'functions' for tools"),
        ({"system": "meta.system"}, r"should be in the data, but no row has 'meta.system' for system"),
    ],
)
def test_columns_that_no_row_has(tmp_path: Path, columns: dict[str, str], message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINE * 2)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / "a.jsonl", Fields(**columns))


def test_a_column_that_some_rows_have(tmp_path: Path) -> None:
    """Rows of JSON may leave out what they have nothing to say in."""
    rows = [ROW, {**ROW, "persona": "Be brief."}, {**ROW, "meta": {"w": 2.0}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = read_examples(tmp_path / "a.jsonl", Fields(system="persona", weight="meta.w"))
    assert [example.weight for example in read.examples] == [None, None, 2.0]
    assert [len(example.prompt) for example in read.examples] == [1, 2, 1] and not read.unused_columns
