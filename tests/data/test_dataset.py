"""Items of a dataset of pairs, and datasets from files."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from dpo_wrapper.data import ByteTokenizer, PreferenceDataset, TokenizedExample
from helpers.chat_templates import template_tokenizer
from helpers.datasets import write_rows

PAIRS = [TokenizedExample((1, 2), ((3, 4, 5), (6,))), TokenizedExample((7,), ((8,), (9, 8)))]


def test_items_by_hand() -> None:
    items = list(PreferenceDataset(PAIRS, -100))
    assert items[0]["preferred_seq"].tolist() == [1, 2, 3, 4, 5]
    assert items[0]["unpreferred_seq"].tolist() == [1, 2, 6, -100, -100]
    assert items[0]["prompt_mask"].tolist() == [True, True, False, False, False]
    assert items[1]["preferred_seq"].tolist() == [7, 8, -100]
    assert list(items[0]) == ["preferred_seq", "unpreferred_seq", "prompt_mask"]
    assert [part.dtype for part in items[0].values()] == [torch.long, torch.long, torch.bool]


def test_one_width_for_the_default_collate() -> None:
    dataset = PreferenceDataset(PAIRS, 0, pad_to=6)
    batch = next(iter(DataLoader(dataset, batch_size=2)))
    assert list(batch) == ["preferred_seq", "unpreferred_seq", "prompt_mask"]
    assert [tuple(part.shape) for part in batch.values()] == [(2, 6)] * 3
    with pytest.raises(
        ValueError, match="pad_to should be at least the longest side, 5, but it is 4: raise pad_to"
    ):
        PreferenceDataset(PAIRS, 0, pad_to=4)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            TokenizedExample((0, 1), ((2,), (3,)), source="a, line 1"),
            "^a, line 1: the chosen sequence should not begin",
        ),
        (TokenizedExample((), ((2,), (0, 3))), "^the rejected sequence should not begin with pad_id 0"),
        (
            TokenizedExample((1,), ((2, 0), (3,))),
            "the chosen sequence should not end with pad_id 0, but it is a token there",
        ),
        (
            TokenizedExample((1,), ((2,), (0,))),
            "should not end .*: choose a pad_id that is no token, such as -100",
        ),
        (
            TokenizedExample((), ((), (3,))),
            "the chosen sequence should have tokens, but it has none: leave the row out",
        ),
        (
            TokenizedExample((1,), ((2,), (3,), (4,))),
            r"should be a pair, but it has 3 completion\(s\): convert the",
        ),
        (
            TokenizedExample((1,), ((2,),), True),
            r"should be a pair, but it has 1 completion\(s\): convert the",
        ),
    ],
)
def test_examples_that_cannot_be_items(pair: TokenizedExample, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceDataset([PAIRS[0], pair], 0)


def test_from_file(tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "chosen": "A", "rejected": "B"}, {"prompt": "Q", "chosen": "A", "rejected": "A"}]
    path = write_rows(tmp_path / "a.jsonl", [*rows, {"prompt": "Q"}])
    with pytest.raises(ValueError, match=r"a.jsonl, line 3, field 'chosen': a row should have this field"):
        PreferenceDataset.from_file(path)
    dataset = PreferenceDataset.from_file(path, "bytes", on_error="skip", pad_to=8)
    assert len(dataset) == 1 and dataset.pad_id == ByteTokenizer().pad_id
    assert dataset[0]["preferred_seq"].tolist() == [256, 81, 65, 257, 258, 258, 258, 258]
    assert dataset.tokenized_examples is not None and dataset.tokenized_examples.num_identical == 1
    assert dataset.tokenized_examples.summary() == (
        "Left out of 3 examples: 1 with an error, 1 with the same tokens in every completion."
    )
    assert PreferenceDataset.from_file(path, on_error="skip", pad_id=-7).pad_id == -7


def test_a_tokenizer_of_transformers_is_taken_as_it_is(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "cd"}])
    tokenizer = template_tokenizer("qwen3")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    taken, loaded = (PreferenceDataset.from_file(path, one) for one in (tokenizer, tmp_path / "tokenizer"))
    assert taken.examples == loaded.examples
    with pytest.raises(
        TypeError, match=r"should be one of transformers, .* but it is int: give one of these"
    ):
        PreferenceDataset.from_file(path, 3)


def test_from_file_refusals(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "Q", "chosen": "A", "rejected": "A"}])
    with pytest.raises(
        ValueError,
        match=r"should be pairs to train on, but there are none .Left out of 1 example: 1 with.*: add rows",
    ):
        PreferenceDataset.from_file(path)
    for taken in (256, 257):
        with pytest.raises(
            ValueError, match=f"pad_id should be neither EOS nor BOS, but it is {taken}, .*: use -100"
        ):
            PreferenceDataset.from_file(path, pad_id=taken)
    write_rows(path, [{"prompt": "Q" * 90, "chosen": "A" * 90, "rejected": "B" * 90}, {"prompt": "Q"}])
    with pytest.raises(
        ValueError, match=r"there are none .*: the first error is 'a.jsonl, line 2, field 'chosen'"
    ):
        PreferenceDataset.from_file(path, pad_id=65, max_length=50, on_error="skip")
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: the chosen sequence should not end with"):
        write_rows(path, [{"prompt": "Q" * 90, "chosen": "A" * 90, "rejected": "B" * 90}])
        PreferenceDataset.from_file(path, pad_id=65, max_length=50)


def test_from_file_takes_ranked_lists_as_pairs_and_no_labels(tmp_path: Path) -> None:
    ranked, labelled = {"prompt": "Q", "completions": ["A", "B", "C"]}, {"prompt": "Q", "completion": "A"}
    path = write_rows(tmp_path / "a.jsonl", [ranked, {**labelled, "label": True}])
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: a row should have two completions or more"):
        PreferenceDataset.from_file(path)
    dataset = PreferenceDataset.from_file(path, on_error="skip")
    sides = [(bytes(x.chosen[:1]), bytes(x.rejected[:1])) for x in dataset.examples]
    assert sides == [(b"A", b"B"), (b"A", b"C"), (b"B", b"C")]
    assert dataset.tokenized_examples is not None and len(dataset.tokenized_examples.errors) == 1
