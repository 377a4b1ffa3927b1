"""Files of every format and form come back as the examples they were made of."""

import gzip
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_wrapper.data import Example, ExampleError, Message, read_examples

GOOD = {"prompt": "Q", "chosen": "A", "rejected": "B"}
LINE = json.dumps(GOOD)
SHARE = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
ROLES = ("system", "user", "assistant", "tool")

_text = st.text(max_size=12)
_message = st.builds(Message, st.sampled_from(ROLES), _text)
_dialogue = st.lists(_message, max_size=3).flatmap(
    lambda turns: st.builds(
        lambda last: (*turns, last), st.builds(Message, st.sampled_from(["system", "user", "tool"]), _text)
    )
)
_split = st.sampled_from([None, "train", "test"])
_pair = st.tuples(_text, _text)
_plain_pairs = st.builds(Example, _text.filter(str.strip), _pair, split=_split)
_dialogue_pairs = st.builds(Example, _dialogue, _pair, split=_split)
_plain_lists = st.builds(Example, _text.filter(str.strip), st.lists(_text, min_size=3, max_size=4).map(tuple))
_dialogue_lists = st.builds(Example, _dialogue, st.lists(_text, min_size=3, max_size=4).map(tuple))
_labelled = st.builds(Example, _text.filter(str.strip), st.tuples(_text), label=st.booleans())
_labelled_dialogues = st.builds(Example, _dialogue, st.tuples(_text), label=st.booleans())


def as_messages(example: Example) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in example.prompt]  # type: ignore[union-attr, dict-item]


def as_shares(example: Example) -> list[dict[str, str]]:
    return [{"from": SHARE[turn.role], "value": turn.content} for turn in example.prompt]  # type: ignore[union-attr, dict-item]


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def share(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


FORMS: dict[str, tuple[Any, Callable[[Example], dict[str, Any]]]] = {
    "plain": (
        _plain_pairs,
        lambda r: {"prompt": r.prompt, "chosen": r.completions[0], "rejected": r.completions[1]},
    ),
    "text": (
        _plain_pairs,
        lambda r: {"text": r.prompt, "chosen": r.completions[0], "rejected": r.completions[1], "id": 1},
    ),
    "messages": (
        _dialogue_pairs,
        lambda r: {
            "prompt": as_messages(r),
            "chosen": [answer(r.completions[0])],
            "rejected": [answer(r.completions[1])],
        },
    ),
    "implicit": (
        _dialogue_pairs,
        lambda r: {
            "chosen": [*as_messages(r), answer(r.completions[0])],
            "rejected": [*as_messages(r), answer(r.completions[1])],
        },
    ),
    "repeated": (
        _dialogue_pairs,
        lambda r: {
            "messages": as_messages(r),
            "chosen": [*as_messages(r), answer(r.completions[0])],
            "rejected": [*as_messages(r), answer(r.completions[1])],
        },
    ),
    "mixed": (
        _dialogue_pairs,
        lambda r: {"prompt": as_messages(r), "chosen": r.completions[0], "rejected": r.completions[1]},
    ),
    "sharegpt": (
        _dialogue_pairs,
        lambda r: {
            "conversations": as_shares(r),
            "chosen": share(r.completions[0]),
            "rejected": share(r.completions[1]),
        },
    ),
    "ranked": (_plain_lists, lambda r: {"prompt": r.prompt, "completions": list(r.completions)}),
    "ranked messages": (
        _dialogue_lists,
        lambda r: {"completions": [[*as_messages(r), answer(text)] for text in r.completions]},
    ),
    "labelled": (
        _labelled,
        lambda r: {"prompt": r.prompt, "completion": r.completions[0], "label": r.label},
    ),
    "labelled messages": (
        _labelled_dialogues,
        lambda r: {"prompt": as_messages(r), "completion": [answer(r.completions[0])], "label": r.label},
    ),
}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """`records` in the format that the name says; 'bom' and 'lines' in the name ask for oddities."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(records), path)
        return path
    escaped = "ascii" in path.name
    if ".jsonl" in path.name.lower() or "lines" in path.name:
        text = "\r\n\n".join(json.dumps(record, ensure_ascii=escaped) for record in records)
    elif "under" in path.name:
        text = json.dumps({"data": records, "version": 1}, ensure_ascii=escaped)
    else:
        text = json.dumps(records, ensure_ascii=escaped, indent=2)
    data = text.encode("utf-8-sig" if "bom" in path.name else "utf-8")
    path.write_bytes(gzip.compress(data, 1) if "gz" in path.name else data)
    return path


FORMATS = [
    "rows.jsonl",
    "rows.jsonl.gz",
    "gz_without_its_ending.jsonl",
    "bom.jsonl",
    "ascii.jsonl",
    "rows.json",
    "bom_ascii.json.gz",
    "under_a_key.json",
    "lines.json",
    "rows.parquet",
    "ROWS.JSONL",
]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60)
@given(data=st.data())
def test_round_trip_of_every_form_through_every_format(form: str, data: st.DataObject) -> None:
    strategy, record_of = FORMS[form]
    examples = data.draw(st.lists(strategy, min_size=1, max_size=3))
    records = [{**record_of(example), "split": example.split} for example in examples]
    name = data.draw(st.sampled_from(FORMATS))
    with tempfile.TemporaryDirectory() as folder:
        read = read_examples(write(Path(folder) / name, records))
    assert not read.errors and all(example.source.startswith(name) for example in read.examples)
    assert [replace(example, source="") for example in read.examples] == examples


def test_places(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f"\n{LINE}\n  \n{LINE}")
    assert [example.source for example in read_examples(tmp_path / "a.jsonl").examples] == [
        "a.jsonl, line 2",
        "a.jsonl, line 4",
    ]
    for name in ("b.json", "b.parquet"):
        places = [example.source for example in read_examples(write(tmp_path / name, [GOOD, GOOD])).examples]
        assert places == [f"{name}, row 1", f"{name}, row 2"]
    (tmp_path / "c.json").write_text(f"{LINE}\n\n{LINE}\n")
    assert [example.source for example in read_examples(tmp_path / "c.json").examples] == [
        "c.json, line 1",
        "c.json, line 3",
    ]


def test_a_json_file_with_one_row_and_no_list(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(LINE)
    read = read_examples(str(tmp_path / "one.json"))
    assert (read.examples, read.errors) == ([Example("Q", ("A", "B"), source="one.json, line 1")], [])


def test_line_separators_inside_strings_end_no_line(tmp_path: Path) -> None:
    odd = "a\u2028b\u2029c\x85d\x0be\x1cf"
    (tmp_path / "a.jsonl").write_text(
        json.dumps({**GOOD, "chosen": odd}, ensure_ascii=False), encoding="utf-8"
    )
    assert read_examples(tmp_path / "a.jsonl").examples[0].completions[0] == odd


def test_gz_ending_without_gzip_inside(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_text(LINE)
    assert len(read_examples(tmp_path / "a.jsonl.gz").examples) == 1


def test_several_files_and_their_names(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.jsonl", [GOOD])
    write(tmp_path / "b.json", [GOOD])
    paths = [tmp_path / "one" / "a.jsonl", str(tmp_path / "b.json"), tmp_path / "two" / "a.jsonl"]
    places = [example.source for example in read_examples(paths).examples]
    assert places == [f"{paths[0]}, line 1", "b.json, row 1", f"{paths[2]}, line 1"]


def test_mixed_forms_in_one_parquet_file(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Q"}]
    records = [{"messages": turns, "prompt": None, "chosen": "A", "rejected": "B"}, GOOD]
    assert [example.prompt for example in read_examples(write(tmp_path / "a.parquet", records)).examples] == [
        (Message("user", "Q"),),
        "Q",
    ]


def test_skipped_rows_are_returned_as_errors(tmp_path: Path) -> None:
    bad = [b'{"prompt": ', b'\xff"}', b"[1]", b'{"prompt": "Q", "chosen": "A"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([LINE.encode(), *bad, LINE.encode()]))
    read = read_examples(tmp_path / "a.jsonl", on_error="skip")
    examples, errors = read.examples, read.errors
    assert [example.source for example in examples] == ["a.jsonl, line 1", "a.jsonl, line 6"]
    assert [str(error).split(":")[0] for error in errors] == [
        "a.jsonl, line 2, column 11",
        "a.jsonl, line 3",
        "a.jsonl, line 4",
        "a.jsonl, line 5, field 'rejected'",
    ]
    with pytest.raises(
        ExampleError, match=r"^a.jsonl, line 2, column 11: the line should be one JSON object"
    ):
        read_examples(tmp_path / "a.jsonl")
