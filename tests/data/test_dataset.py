"""Items, and batches that hold exactly the tokens of the pairs they were made of."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dpo_wrapper.data import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    PreferenceCollator,
    PreferenceDataset,
    PreferenceItem,
    TokenPair,
)
from helpers import tokenizers as tiny

PAIRS = [TokenPair((1, 2), (3, 4, 5), (6,)), TokenPair((7,), (8,), (9, 8))]
IDS = st.lists(st.integers(0, 9), max_size=6).map(tuple)
FILLERS = [-100, 10]
NONEMPTY = st.builds(TokenPair, IDS, IDS.filter(len), IDS.filter(len))


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_items_by_hand() -> None:
    items = list(PreferenceDataset(PAIRS, -100))
    assert items[0].preferred_seq.tolist() == [1, 2, 3, 4, 5]
    assert items[0].unpreferred_seq.tolist() == [1, 2, 6, -100, -100]
    assert items[0].prompt_mask.tolist() == [True, True, False, False, False]
    assert items[1].preferred_seq.tolist() == [7, 8, -100]
    assert isinstance(items[0], PreferenceItem)
    assert [part.dtype for part in items[0]] == [torch.long, torch.long, torch.bool]


def test_batch_by_hand() -> None:
    batch = PreferenceCollator(-100)(list(PreferenceDataset(PAIRS, -100)))
    assert list(batch) == ["preferred_seq", "unpreferred_seq", "prompt_mask", "seq_mask"]
    assert batch["preferred_seq"].tolist() == [[1, 2, 3, 4, 5], [7, 8, 0, 0, 0]]
    assert batch["unpreferred_seq"].tolist() == [[1, 2, 6], [7, 9, 8]]
    assert [mask.int().tolist() for mask in batch["prompt_mask"]] == [
        [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]],
        [[1, 1, 0], [1, 0, 0]],
    ]
    assert [mask.int().tolist() for mask in batch["seq_mask"]] == [
        [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
        [[1, 1, 1], [1, 1, 1]],
    ]
    left = PreferenceCollator(-100, padding_side="left")(list(PreferenceDataset(PAIRS, -100)))
    assert left["preferred_seq"].tolist() == [[1, 2, 3, 4, 5], [0, 0, 0, 7, 8]]
    assert left["prompt_mask"][0].int().tolist() == [[1, 1, 0, 0, 0], [0, 0, 0, 1, 0]]


@given(
    st.lists(NONEMPTY, min_size=1, max_size=5),
    st.sampled_from(FILLERS),
    st.sampled_from(["left", "right"]),
    st.none() | st.integers(12, 20),
)
def test_stripping_and_padding_give_back_the_tokens(
    pairs: list[TokenPair], pad_id: int, side: Any, pad_to: int | None
) -> None:
    dataset = PreferenceDataset(pairs, pad_id, pad_to=pad_to)
    items = list(dataset)
    assert len(dataset) == len(items) == len(pairs)
    assert all(len({len(part) for part in item}) == 1 for item in items)
    batch = PreferenceCollator(pad_id, padding_side=side)(items)
    for name, index, which in (("preferred_seq", 0, "chosen"), ("unpreferred_seq", 1, "rejected")):
        seqs, real, prompt = batch[name], batch["seq_mask"][index], batch["prompt_mask"][index]
        wanted = [(pair.prompt, getattr(pair, which)) for pair in pairs]
        assert seqs.shape == real.shape == prompt.shape == (len(pairs), max(len(p + c) for p, c in wanted))
        assert (seqs.dtype, real.dtype, prompt.dtype) == (torch.long, torch.bool, torch.bool)
        for row, (ids, completion) in enumerate(wanted):
            assert tuple(seqs[row, real[row]].tolist()) == ids + completion
            assert tuple(seqs[row, prompt[row]].tolist()) == ids
        assert not (prompt & ~real).any()
        assert (seqs[~real] == max(pad_id, 0)).all()
        # Padding is on one side, in one run.
        steps = real.int().diff(dim=1)
        assert (steps <= 0).all() if side == "right" else (steps >= 0).all()


def test_one_width_for_the_default_collate() -> None:
    dataset = PreferenceDataset(PAIRS, 0, pad_to=6)
    batch = next(iter(DataLoader(dataset, batch_size=2)))
    assert isinstance(batch, PreferenceItem)
    assert [tuple(part.shape) for part in batch] == [(2, 6)] * 3
    with pytest.raises(
        ValueError, match="expected pad_to to be at least the longest side, 5, got 4; raise pad_to"
    ):
        PreferenceDataset(PAIRS, 0, pad_to=4)


def test_loader_with_collator_and_plain_tuples() -> None:
    loader = DataLoader(PreferenceDataset(PAIRS, 0), batch_size=2, collate_fn=PreferenceCollator(0))  # type: ignore[arg-type]
    (batch,) = loader
    plain = PreferenceCollator(0)([tuple(item) for item in PreferenceDataset(PAIRS, 0)])  # type: ignore[misc]
    assert torch.equal(batch["preferred_seq"], plain["preferred_seq"])
    assert torch.equal(batch["seq_mask"][1], plain["seq_mask"][1])


def test_pitfall_07_a_side_of_padding_alone_has_no_token() -> None:
    nothing, something = torch.full((2,), -100), torch.tensor([1, 2])
    batch = PreferenceCollator(-100)([(nothing, something, torch.tensor([True, False]))])
    assert batch["preferred_seq"].tolist() == [[0]] and not batch["seq_mask"][0].any()
    assert not batch["prompt_mask"][0].any()


@pytest.mark.parametrize("pad", ["<pad>", "</s>", None])
def test_pitfall_11_pad_that_is_eos_masks_no_eos(tmp_path: Path, pad: str | None) -> None:
    tokenizer = HuggingFaceTokenizer.load(tiny.save_tokenizer(tmp_path / "tokenizer", pad=pad))
    path = write(
        tmp_path / "a.jsonl", [{"prompt": "Hello", "chosen": "there", "rejected": "there, how are you?"}]
    )
    dataset = PreferenceDataset.from_file(path, tokenizer)
    batch = PreferenceCollator(dataset.pad_id)(list(dataset))
    for index, name in enumerate(("preferred_seq", "unpreferred_seq")):
        scored = batch["seq_mask"][index] & ~batch["prompt_mask"][index]
        scored_ids = batch[name][scored].tolist()
        assert scored_ids[-1] == 1 and scored_ids.count(1) == 1
        assert batch[name][0, 0] == 0


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            TokenPair((0, 1), (2,), (3,), "a, line 1"),
            "^a, line 1: expected a chosen sequence that does not begin",
        ),
        (TokenPair((), (2,), (0, 3)), "^expected a rejected sequence that does not begin with the pad_id 0"),
        (
            TokenPair((1,), (2, 0), (3,)),
            "a chosen sequence that does not end with the pad_id 0, got it as a token",
        ),
        (TokenPair((1,), (2,), (0,)), "does not end .*; choose a pad_id that is no token, such as -100"),
        (
            TokenPair((), (), (3,)),
            "expected at least one token in the chosen sequence, got none; leave the row out",
        ),
    ],
)
def test_padding_that_could_not_be_told_from_text(pair: TokenPair, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceDataset([PAIRS[0], pair], 0)


def test_a_pad_inside_a_side_is_a_token() -> None:
    batch = PreferenceCollator(0)(list(PreferenceDataset([TokenPair((1, 0, 0), (0, 2), (3,))], 0)))
    assert batch["preferred_seq"].tolist() == [[1, 0, 0, 0, 2]] and batch["seq_mask"][0].all()


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "expected at least one item, got none; collate batches that are not empty"),
        (
            [(torch.tensor([1, 2]), torch.tensor([1]), torch.tensor([True]))],
            r"of one length.*got \(2,\) torch.int64",
        ),
        (
            [(torch.tensor([1]), torch.tensor([1]), torch.tensor([1]))],
            "integers, integers and bool, got .* as item 0",
        ),
        (
            [(torch.tensor([1.0]), torch.tensor([1]), torch.tensor([True]))],
            "float32.*; collate the items of a",
        ),
        ([(torch.tensor([[1]]), torch.tensor([[1]]), torch.tensor([[True]]))], r"got \(1, 1\) torch.int64"),
        ([(torch.tensor([1]), torch.tensor([1]))], "expected .preferred_seq, unpreferred_seq, prompt_mask."),
        ([([1], [1], [True])], "got list, list, list as item 0"),
        (
            [(torch.tensor([9, 1]), torch.tensor([1, 2]), torch.tensor([True, False]))],
            "got pad_id 9; pad items on the right",
        ),
    ],
)
def test_items_that_cannot_be(items: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceCollator(9)(items)


def test_padding_side() -> None:
    with pytest.raises(
        ValueError, match="expected padding_side 'right' or 'left', got 'both'; choose one of them"
    ):
        PreferenceCollator(0, padding_side="both")  # type: ignore[arg-type]


def test_from_file(tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "chosen": "A", "rejected": "B"}, {"prompt": "Q", "chosen": "A", "rejected": "A"}]
    path = write(tmp_path / "a.jsonl", [*rows, {"prompt": "Q"}])
    with pytest.raises(ValueError, match=r"a.jsonl, line 3, field 'chosen': expected this field"):
        PreferenceDataset.from_file(path)
    dataset = PreferenceDataset.from_file(path, "bytes", on_error="skip", pad_to=8)
    assert len(dataset) == 1 and dataset.pad_id == ByteTokenizer().pad_id
    assert dataset[0].preferred_seq.tolist() == [256, 81, 65, 257, 258, 258, 258, 258]
    assert dataset.encoded is not None and dataset.encoded.identical == 1
    assert dataset.encoded.summary() == (
        "Left out of 3 rows: 1 with an error, 1 with the same tokens on both sides."
    )
    assert PreferenceDataset.from_file(path, on_error="skip", pad_id=-7).pad_id == -7


def test_from_file_refusals(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "Q", "chosen": "A", "rejected": "A"}])
    with pytest.raises(
        ValueError, match=r"expected pairs to train on, got none .Left out of 1 rows: 1 with the same"
    ):
        PreferenceDataset.from_file(path)
    for taken in (256, 257):
        with pytest.raises(
            ValueError, match=f"a pad_id that is neither EOS nor BOS, got {taken}, .*; use -100"
        ):
            PreferenceDataset.from_file(path, pad_id=taken)
    write(path, [{"prompt": "Q" * 90, "chosen": "A" * 90, "rejected": "B" * 90}, {"prompt": "Q"}])
    with pytest.raises(ValueError, match=r"got none .*; the first error is: a.jsonl, line 2, field 'chosen'"):
        PreferenceDataset.from_file(path, pad_id=65, max_length=50, on_error="skip")
    with pytest.raises(
        ValueError, match=r"a.jsonl, line 1: expected a chosen sequence that does not end with"
    ):
        write(path, [{"prompt": "Q" * 90, "chosen": "A" * 90, "rejected": "B" * 90}])
        PreferenceDataset.from_file(path, pad_id=65, max_length=50)
