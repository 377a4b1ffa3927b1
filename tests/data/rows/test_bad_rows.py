"""Bad rows get one sentence each, and lose no good row."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_wrapper.data import ExampleError, Fields, read_examples, to_example
from helpers.bad_rows import ROWS

GOOD = {"prompt": "Q", "chosen": "A", "rejected": "B"}
IDS = [f"{k} {field or 'row'}" for k, (_, field, _, _) in enumerate(ROWS)]


def check_sentence(message: str, place: str, received: str, remedy: str) -> None:
    """X should be A, but it is B: remedy."""
    problem, _, end = message.rpartition(": ")
    assert message.startswith(place), message
    assert " should " in problem and ", but " in problem and received in problem, message
    assert remedy in end and end.endswith(".") and not end.endswith(".."), message
    assert "\n" not in message and len(message) < 350 and "Error" not in message, message


@pytest.mark.parametrize(("row", "field", "received", "remedy"), ROWS, ids=IDS)
def test_bad_row(row: dict[str, Any], field: str, received: str, remedy: str) -> None:
    with pytest.raises(ExampleError) as caught:
        to_example(row, Fields(), "a.jsonl, line 2")
    place = f"a.jsonl, line 2, field '{field}" if field else "a.jsonl, line 2: "
    check_sentence(str(caught.value), place, received, remedy)
    assert caught.value.source == "a.jsonl, line 2"


@pytest.mark.parametrize("row", [row for row, _, _, _ in ROWS], ids=IDS)
def test_a_bad_row_loses_no_good_one(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (GOOD, row, GOOD)))
    read = read_examples(path, on_error="skip")
    assert [example.source for example in read.examples] == ["a.jsonl, line 1", "a.jsonl, line 3"]
    assert [error.source for error in read.errors] == ["a.jsonl, line 2"] and read.num_rows == 3
    assert "1 rows could not be read and are left out; the first: a.jsonl, line 2" in " ".join(read.notes())
    with pytest.raises(ExampleError, match=r"^a\.jsonl, line 2"):
        read_examples(path)


def test_the_corpus_is_large() -> None:
    assert len(ROWS) >= 130 and len({(field, received) for _, field, received, _ in ROWS}) >= 110
