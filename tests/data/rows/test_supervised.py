"""Rows that are imitated, and documents: their forms, what a file may hold, and what `kind` forces."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_wrapper.data import Example, ExampleError, Fields, Message, read_examples, to_example
from dpo_wrapper.data.rows.comparison import TiedRowError, UndesirableRowError
from helpers.bad_rows import ALONE, ROWS
from helpers.datasets import write_rows

ASK, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
USER, SAID = Message("user", "2 + 2?"), Message("assistant", "4")
SHARE = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
LONGER = (USER, SAID, Message("user", "2 + 2?"))
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "add"}}

FORMS: list[tuple[dict[str, Any], Any]] = [
    ({"prompt": "2 + 2?", "completion": "4"}, "2 + 2?"),
    ({"prompt": [ASK], "completion": [ANSWER]}, (USER,)),
    ({"prompt": [ASK], "completion": "4"}, (USER,)),
    ({"instruction": "2 + 2?", "input": "", "output": "4"}, "2 + 2?"),
    ({"instruction": "Add.", "input": "2 and 2", "output": "4", "text": "Add. 2 and 2: 4"}, "Add.\n2 and 2"),
    ({"question": "2 + 2?", "answer": "4", "system": "S"}, (Message("system", "S"), USER)),
    ({"query": "2 + 2?", "response": "4", "history": [["2 + 2?", "4"]]}, (USER, SAID, USER)),
    ({"text": "2 + 2?", "completion": "4"}, "2 + 2?"),
    ({"messages": [ASK, ANSWER]}, (USER,)),
    ({"messages": [ASK, ANSWER], "answer": "4", "problem": "2 + 2?"}, (USER,)),
    ({"messages": [ASK], "response": "4"}, (USER,)),
    ({"messages": json.dumps([ASK, ANSWER])}, (USER,)),
    ({"messages": [ASK, ANSWER, ASK, ANSWER]}, LONGER),
    ({"conversations": SHARE, "system": "S"}, (Message("system", "S"), USER)),
    ({"completion": "Human: 2 + 2?\n\nAssistant: 4"}, (USER,)),
]


@pytest.mark.parametrize(("record", "prompt"), FORMS)
@pytest.mark.parametrize("kind", ["auto", "prompt_completion"])
def test_prompt_with_a_completion(record: dict[str, Any], prompt: Any, kind: Any) -> None:
    example = to_example({**record, "weight": 2, "split": "val"}, source="a, line 1", kind=kind)
    assert example == Example(prompt, ("4",), weight=2.0, split="test", source="a, line 1")
    assert example.dataset_type == "prompt_completion" and example.form in (
        "prompt and completion",
        "dialogue",
    )


def test_tools_reach_a_dialogue() -> None:
    assert to_example({"messages": [ASK, ANSWER], "tools": [TOOL]}, kind="auto").tools == (TOOL,)


@pytest.mark.parametrize("name", ["text", "content"])
def test_documents(name: str) -> None:
    record = {name: " Once\n", "url": "x", "weight": 0.5, "split": "train"}
    example = to_example(record, source="s", kind="auto")
    assert example == Example("", (" Once\n",), weight=0.5, split="train", source="s", is_document=True)
    assert example.dataset_type == "language_modeling" and example.form == "text"
    assert to_example({"body": "x"}, Fields(text="body"), kind="auto").completions == ("x",)
    own_prompt = to_example({"text": "q", "answer": "a"}, Fields(prompt="text"), kind="auto")
    assert (own_prompt.prompt, own_prompt.completions) == ("q", ("a",))


@pytest.mark.parametrize("spans", [[[0, 2], [1, 3], [4, 4]], "[[0, 2], [1, 3], [4, 4]]"])
def test_masked_texts(spans: Any) -> None:
    example = to_example({"text": "abcd", "loss_masking_spans": spans}, kind="auto")
    assert example == Example("", ("abcd",), loss_masking_spans=((0, 2), (1, 3), (4, 4)))
    assert example.dataset_type == "prompt_completion"
    named = Fields(text="body", loss_masking_spans="mask")
    assert to_example({"body": "abcd", "mask": [[0, 2], [1, 3], [4, 4]]}, named, kind="auto") == example
    for none in ([], None):  # such a row of a table stays what the others are
        plain = to_example({"text": "abcd", "loss_masking_spans": none}, kind="auto")
        assert plain == Example("", ("abcd",))


SPAN = "a span should be a pair of integers, start and end, but it is"
INSIDE = "a span should lie in the text of 4 characters, but it is"
TEXT = "the text should be a string, but it is"
SPANS, ABCD = "loss_masking_spans", {"text": "abcd"}
BAD: list[tuple[dict[str, Any], str, str, str]] = [
    ({"foo": 1}, "", "'chosen' and 'rejected' (preference), 'prompt' and 'completion', 'messages', or 'text' "
     "with 'loss_masking_spans' (prompt_completion), or 'text' (language_modeling), but it has 'foo'",
     "--columns"),
    ({"role": "user", "content": "x"}, "", "but it has 'role', 'content'", "--columns"),
    ({"text": 3}, "text", f"{TEXT} the number 3", "leave the row out"),
    ({"text": ["a"]}, "text", f"{TEXT} a list of 1", "leave the row out"),
    ({"text": "\ud800"}, "text", "half of a surrogate pair", "remove or replace"),
    ({"text": "abcd", "images": ["a.png"]}, "images", "a row should be text alone", "leave the row out"),
    ({"text": "abcd", "weight": -1}, "weight", "should not be negative", "leave the row out"),
    ({"text": "abcd", "split": "half"}, "split", "'train' or 'test'", "rename it"),
    ({**ABCD, SPANS: 3}, SPANS, "but they are the number 3", "[[0, 12]"),
    ({**ABCD, SPANS: "x"}, SPANS, "but they are 'x'", "[[0, 12]"),
    ({**ABCD, SPANS: [0, 2]}, SPANS, f"{SPAN} the number 0", "[0, 12]"),
    ({**ABCD, SPANS: [[0]]}, SPANS, f"{SPAN} a list of 1", "[0, 12]"),
    ({**ABCD, SPANS: [[0, 1.0]]}, SPANS, f"{SPAN} a list", "[0, 12]"),
    ({**ABCD, SPANS: [[True, 1]]}, SPANS, f"{SPAN} a list", "[0, 12]"),
    ({**ABCD, SPANS: [[0, 5]]}, SPANS, f"{INSIDE} [0, 5]", "correct it"),
    ({**ABCD, SPANS: [[-1, 2]]}, SPANS, f"{INSIDE} [-1, 2]", "correct it"),
    ({**ABCD, SPANS: [[3, 2]]}, SPANS, f"{INSIDE} [3, 2]", "correct it"),
    ({"prompt": "a", "completion": "b", SPANS: [[0, 1]]}, SPANS,
     "the spans should stand beside a text alone, but the row has 'completion'", "as one 'text'"),
    ({"messages": [ASK]}, "messages", "should end in an assistant turn, but it ends in a user turn", "add"),
    ({"messages": [ANSWER]}, "messages", "a prompt should come first, but none does", "add it"),
    ({"messages": []}, "messages", "at least one message, but the list is empty", "add some"),
    ({"output": "b"}, "prompt", "a row should have this field, but it has 'output'", "--columns prompt="),
    ({"prompt": "a", "completion": 3}, "completion", "but it is the number 3", "leave the row out"),
    ({"prompt": "a", "completion": ["b"]}, "completion", "but it is a list of texts", "one text"),
    ({"prompt": "a", "chosen": "b"}, "rejected", "a row should have this field", "add it"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "field", "problem", "remedy"), BAD)
def test_bad_rows(record: dict[str, Any], field: str, problem: str, remedy: str) -> None:
    with pytest.raises(ExampleError) as caught:
        to_example(record, source="a.jsonl, line 2", kind="auto")
    message = str(caught.value)
    assert message.startswith(f"a.jsonl, line 2, field '{field}" if field else "a.jsonl, line 2: ")
    assert problem in message and remedy in message.rpartition(": ")[2] and message.endswith("."), message
    assert " should " in message and ", but " in message and "\n" not in message


@pytest.mark.parametrize("record", [row for row, _, _, remedy in ROWS if remedy != ALONE])
def test_bad_preferences_stay_bad_whatever_else_a_file_may_hold(record: dict[str, Any]) -> None:
    """None of them becomes a row to imitate because a part of it is missing or wrong."""
    with pytest.raises(ExampleError):
        to_example(record, kind="auto")


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 0.5}
LIST = {"prompt": "q", "completions": ["b", "a", "c"], "scores": [1, 3, 3]}
GOOD, BAD_LABEL = ({"prompt": "q", "completion": "a", "label": label} for label in (True, False))
TIE = {"prompt": "q", "response_a": "a", "response_b": "b", "winner": "tie"}


def test_preferences_as_prompts_with_completions() -> None:
    for record in (PAIR, LIST, GOOD):
        assert to_example(record, kind="prompt_completion") == Example("q", ("a",))
        assert to_example(record, kind="auto").dataset_type != "prompt_completion"
    with pytest.raises(UndesirableRowError):
        to_example(BAD_LABEL, kind="prompt_completion")
    with pytest.raises(TiedRowError):
        to_example(TIE, kind="prompt_completion")
    dialogue = {"chosen": [ASK, ANSWER], "rejected": [ASK, {"role": "assistant", "content": "5"}]}
    assert to_example(dialogue, kind="prompt_completion") == Example((USER,), ("4",))


def test_a_kind_takes_its_own_rows_alone() -> None:
    text, masked = {"text": "abc"}, {"text": "abc", "loss_masking_spans": [[0, 1]]}
    assert to_example(text, kind="prompt_completion") == Example("", ("abc",))
    assert to_example(masked, kind="language_modeling") == Example("", ("abc",), is_document=True)
    whole = {"instruction": "a", "output": "b", "text": "a b"}
    assert to_example(whole, kind="language_modeling").completions == ("a b",)
    for record in (PAIR, LIST, {"prompt": "a", "completion": "b"}, {"messages": [ASK, ANSWER]}):
        with pytest.raises(
            ExampleError, match=r"a row should have 'text' \(language_modeling\), but it has '"
        ):
            to_example(record, kind="language_modeling")
    for kind in ("preference", "ranked", "unpaired_preference"):
        assert to_example(PAIR, kind=kind) == to_example(PAIR)
        with pytest.raises(ExampleError, match="or use the row for supervised training"):
            to_example(text, kind=kind)
    with pytest.raises(ExampleError, match="should have 'prompt' and 'completion', 'messages', or 'text' "):
        to_example({"foo": 1}, kind="prompt_completion")


ONE_OF_EACH = {
    "preference": PAIR,
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "language_modeling": {"text": "abc"},
}


@pytest.mark.parametrize("first", ONE_OF_EACH)
@pytest.mark.parametrize("other", ONE_OF_EACH)
def test_a_file_holds_one_kind(tmp_path: Path, first: str, other: str) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"foo": 1}, ONE_OF_EACH[first], ONE_OF_EACH[other]])
    read = read_examples(file, kind="auto", on_error="skip")
    unknown, *errors = map(str, read.errors)
    assert unknown.startswith("a.jsonl, line 1: ") and read.num_rows == 3
    if first == other:
        assert [example.source for example in read.examples] == ["a.jsonl, line 2", "a.jsonl, line 3"]
    else:
        (error,) = errors
        assert error == (
            f"a.jsonl, line 3: a file should hold rows of one kind, but this one holds {first} before and "
            f"{other} in this row: write them into two files, or force one kind with --kind."
        )
        assert [example.source for example in read.examples] == ["a.jsonl, line 2"]


def test_files_and_preferences_may_differ(tmp_path: Path) -> None:
    files = [write_rows(tmp_path / f"{name}.jsonl", [row]) for name, row in ONE_OF_EACH.items()]
    types = [example.dataset_type for example in read_examples(files, kind="auto").examples]
    assert types == list(ONE_OF_EACH)
    mixed = read_examples(write_rows(tmp_path / "mixed.jsonl", [PAIR, LIST, GOOD]), kind="auto")
    assert [example.dataset_type for example in mixed.examples] == [
        "preference", "ranked", "unpaired_preference"
    ]  # fmt: skip
    with pytest.raises(ExampleError, match="one answer alone"):
        read_examples(files)
    with pytest.raises(ValueError, match=r"kind should be 'auto' or one of preference, .*, but it is 'sft'"):
        read_examples(files, kind="sft")  # type: ignore[arg-type]


def test_notes(tmp_path: Path) -> None:
    rows = [{**PAIR, "loss_masking_spans": [[0, 1]]}, GOOD, BAD_LABEL, TIE, {**PAIR, "id": 1}]
    file = write_rows(tmp_path / "a.jsonl", rows)
    read = read_examples(file, kind="auto")
    ignored = "1 rows have loss_masking_spans, which are ignored: only a text of prompt_completion has them."
    assert ignored in read.notes() and "Columns that were not used: id." in read.notes()
    read = read_examples(file, kind="prompt_completion")
    assert (read.num_rows, len(read.examples), read.num_undesirable, read.num_tied) == (5, 3, 1, 1)
    assert "1 rows with an undesirable completion are left out." in read.notes() and ignored in read.notes()
    assert "Columns that were not used: id, margin." in read.notes()
    masked = {"text": "abc", "loss_masking_spans": [[0, 1]]}
    read = read_examples(write_rows(tmp_path / "b.jsonl", [masked]), kind="auto")
    assert read.notes() == [] and read.forms == {"text with masked spans": 1}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_tables(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import Table, csv, parquet

    columns: dict[str, Any] = {"text": ["abc", "def"], "loss_masking_spans": [[[0, 1]], []]}
    if ending == "csv":
        csv.write_csv(
            Table.from_pydict({**columns, "loss_masking_spans": ["[[0, 1]]", "[]"]}), tmp_path / "a.csv"
        )
    else:
        parquet.write_table(Table.from_pydict(columns), tmp_path / "a.parquet")
    first, second = read_examples(tmp_path / f"a.{ending}", kind="auto").examples
    assert (first.loss_masking_spans, second.loss_masking_spans) == (((0, 1),), ())


_KEYS = st.sampled_from(
    ["text", "content", SPANS, "prompt", "completion", "messages", "role", "output", "label"]
)
_LEAVES = st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=5)


@pytest.mark.parametrize("kind", ["auto", "prompt_completion", "language_modeling"])
@given(
    record=st.recursive(
        _LEAVES,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=5),
        max_leaves=12,
    )
)
def test_anything_is_an_example_or_an_example_error(kind: Any, record: Any) -> None:
    try:
        example = to_example(record, Fields(), "place", kind)
    except ExampleError as error:
        assert str(error).startswith("place")
    except UndesirableRowError:
        assert kind == "prompt_completion" and record["label"] is not True
    else:
        assert isinstance(example, Example) and (kind == "auto" or example.dataset_type == kind)
