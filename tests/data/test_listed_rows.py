"""Ranked lists and labelled rows from a file to the loss."""

import json
from pathlib import Path

import pytest
import torch

from dpo_wrapper import DPO, RankedBatch, UnpairedBatch
from dpo_wrapper.data import ByteTokenizer, Fields, ListedRow, encode_listed, normalize_listed, read_as
from dpo_wrapper.data.turns import Message
from dpo_wrapper.losses import KTO, PlackettLuce
from helpers.models import ZOO

BYTES = ByteTokenizer()
BOS, EOS = BYTES.bos_id, BYTES.eos_id


def test_rows():
    row = normalize_listed({"prompt": "Q", "completions": ["A", "B", "C"]}, where="here")
    assert (row.prompt, row.completions, row.label, row.where) == ("Q", ("A", "B", "C"), None, "here")
    row = normalize_listed({"prompt": "Q", "completion": "A", "label": False})
    assert (row.prompt, row.completions, row.label) == ("Q", ("A",), False)
    asked = [{"role": "user", "content": "Q"}]
    answers = [[{"role": "assistant", "content": text}] for text in "AB"]
    row = normalize_listed({"prompt": asked, "completions": answers})
    assert row.prompt == (Message("user", "Q"),) and row.completions == ("A", "B")
    whole = [f"\n\nHuman: Q\n\nAssistant: {text}" for text in "AB"]
    row = normalize_listed({"completions": whole})
    assert row.prompt == (Message("user", "Q"),) and row.completions == ("A", "B")


@pytest.mark.parametrize(
    "record, message",
    [
        ([1], "^here: expected an object with a prompt and completions, got"),
        (
            {"prompt": "Q"},
            "^here, field 'completion': expected this field, got a record with 'prompt'; add it",
        ),
        ({"prompt": "Q", "completion": "A"}, "^here, field 'label': expected true or false, got null"),
        (
            {"prompt": "Q", "completion": "A", "label": 1},
            "field 'label': expected true or false, got the number",
        ),
        (
            {"prompt": "Q", "completion": 3, "label": True},
            "^here, field 'completion': expected text or a list",
        ),
        ({"completion": "A", "label": True}, "^here, field 'prompt': expected this field"),
        ({"prompt": "Q", "completions": ["A"]}, "^here, field 'completions': expected a list of two"),
        ({"prompt": "Q", "completions": "AB"}, "^here, field 'completions': expected a list of two"),
        (
            {"completions": ["\n\nHuman: Q\n\nAssistant: A", "\n\nHuman: R\n\nAssistant: B"]},
            "^here, field 'completions': expected completions of one prompt, got another one before number 2",
        ),
    ],
)
def test_bad_rows(record, message: str):
    with pytest.raises(ValueError, match=message):
        normalize_listed(record, where="here")


def test_tokens():
    rows = [normalize_listed({"prompt": "abcdef", "completions": ["xyz", "w", ""]})]
    (tokens,) = encode_listed(rows, BYTES, 32).entries
    assert tokens.prompt == (BOS, *b"abcdef")
    assert tokens.completions == ((*b"xyz", EOS), (*b"w", EOS), (EOS,))
    (short,) = encode_listed(rows, BYTES, 9).entries  # the prompt gives way, alike for all
    assert short.prompt == (BOS, *b"cdef") and short.completions == tokens.completions


def test_files_to_losses(tmp_path: Path):
    ranked, labelled = tmp_path / "ranked.jsonl", tmp_path / "labelled.jsonl"
    ranked.write_text(
        "\n".join(json.dumps({"prompt": "Q", "completions": ["A", "B", "CD"][:n]}) for n in (3, 2))
    )
    labelled.write_text(
        "\n".join(
            json.dumps({"prompt": text, "completion": text, "label": text == "A"})
            for text in ("A", "B", "CD")
        )
        + '\n{"prompt": 1, "completion": 2, "label": true}'
    )
    with pytest.raises(ValueError, match=r"labelled.jsonl, line 4, field 'completion'"):
        read_as("rows", labelled)
    rows, errors = read_as("rows", labelled, on_error="skip")
    assert len(rows) == 3 and len(errors) == 1

    def small(ids: tuple[int, ...]) -> list[int]:
        return [x % 37 for x in ids]

    policy, reference = (ZOO["xt-rotary"](seed) for seed in range(2))
    lists = encode_listed(read_as("lists", ranked)[0], BYTES, 16).entries
    batch = RankedBatch.from_lists(
        [small(x.prompt) for x in lists], [[small(y) for y in x.completions] for x in lists]
    )
    assert DPO(policy, loss=PlackettLuce(), reference=reference)(batch).isfinite()
    single = encode_listed(rows, BYTES, 16).entries
    batch = UnpairedBatch.from_lists(
        [small(x.prompt) for x in single],
        [small(x.completions[0]) for x in single],
        [x.label for x in single],
    )
    assert batch.label.equal(torch.tensor([True, False, False]))
    assert DPO(policy, loss=KTO(), reference=reference)(batch).isfinite()


def test_rows_of_every_kind_in_one_file(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "prompt": ["P", "Q", "R"],
            "chosen": ["A", None, None],
            "rejected": ["B", None, None],
            "completions": [None, ["A", "B", "C"], None],
            "completion": [None, None, "A"],
            "label": [None, None, True],
            "weight": [None, 2.0, None],
            "split": ["test", None, "train"],
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    pairs, errors = read_as("pairs", tmp_path / "rows.parquet", on_error="skip")
    assert [(r.prompt, r.chosen, r.rejected, r.weight, r.split) for r in pairs] == [
        ("P", "A", "B", None, "test"),
        ("Q", "A", "B", 2.0, None),
        ("Q", "A", "C", 2.0, None),
        ("Q", "B", "C", 2.0, None),
    ]
    assert len(errors) == 1 and "rows.parquet, row 3: expected two completions to compare" in str(errors[0])
    best, _ = read_as("pairs", tmp_path / "rows.parquet", on_error="skip", ranking="best")
    assert [r.rejected for r in best] == ["B", "B", "C"]
    lists, _ = read_as("lists", tmp_path / "rows.parquet", on_error="skip")
    assert [(r.completions, r.weight, r.split) for r in lists] == [
        (("A", "B"), None, "test"),
        (("A", "B", "C"), 2.0, None),
    ]
    rows, _ = read_as("rows", tmp_path / "rows.parquet", on_error="skip")
    assert [(r.prompt, r.completions, r.label) for r in rows] == [
        ("P", ("A",), True),
        ("P", ("B",), False),
        ("R", ("A",), True),
    ]
    encoded = encode_listed(rows, BYTES, 8)
    assert [entry.mismatched for entry in encoded.entries if entry.prompt == (BOS, *b"P")].count(()) <= 1


def test_a_file_of_one_record(tmp_path: Path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"prompt": "Q", "completions": ["A", "B"]}))
    (row,), _ = read_as("lists", path)
    assert row.completions == ("A", "B")


def test_other_names_of_the_prompt(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "Q", "completion": "A", "label": True}))
    (row,), _ = read_as("rows", path, Fields(prompt="question"))
    assert row.prompt == "Q"


def test_mismatched_completions_are_of_other_prompts_and_fit():
    rows = [
        ListedRow(prompt, (text,), True)
        for prompt, text in zip("ABCD", ("x", "yy", "z" * 9, ""), strict=True)
    ]
    for seed in range(4):
        entries = encode_listed(rows, BYTES, 8, seed=seed).entries
        assert len(entries) == 4
        taken = sorted(entry.mismatched for entry in entries)
        whole = sorted(entry.completions[0] for entry in entries)
        assert taken == whole  # each once, none longer than its place
        for entry in entries:
            assert entry.mismatched != entry.completions[0]
            assert len(entry.prompt) + len(entry.mismatched) <= 8
    assert (
        len({tuple(e.mismatched for e in encode_listed(rows, BYTES, 8, seed=s).entries) for s in range(9)})
        > 1
    )
