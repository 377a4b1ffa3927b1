"""Batches hold exactly the tokens of the examples they were made of."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dpo_wrapper.batches import PreferenceBatch, TreeOptions
from dpo_wrapper.batches.sequences import ScoredSequences
from dpo_wrapper.data import (
    HuggingFaceTokenizer,
    PreferenceCollator,
    PreferenceDataset,
    TokenizedExample,
    collate_ranked,
    scored_sequences,
)
from dpo_wrapper.data.collate import (
    COLLATE_FNS,
    collate_preference,
    collate_sft,
    collate_unpaired,
    group_by_tokens,
)
from helpers import tokenizers as tiny
from helpers.datasets import write_rows

PAIRS = [TokenizedExample((1, 2), ((3, 4, 5), (6,))), TokenizedExample((7,), ((8,), (9, 8)))]
IDS = st.lists(st.integers(0, 9), max_size=6).map(tuple)
FILLERS = [-100, 10]
NONEMPTY = st.builds(TokenizedExample, IDS, st.tuples(IDS.filter(len), IDS.filter(len)))


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
    pairs: list[TokenizedExample], pad_id: int, side: Any, pad_to: int | None
) -> None:
    dataset = PreferenceDataset(pairs, pad_id, pad_to=pad_to)
    items = list(dataset)
    assert len(dataset) == len(items) == len(pairs)
    assert all(len({len(part) for part in item.values()}) == 1 for item in items)
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


def item(preferred: Any, unpreferred: Any, prompt_mask: Any) -> dict[str, Any]:
    return {"preferred_seq": preferred, "unpreferred_seq": unpreferred, "prompt_mask": prompt_mask}


def test_loader_with_collator() -> None:
    dataset = PreferenceDataset(PAIRS, 0)
    (batch,) = DataLoader(dataset, batch_size=2, collate_fn=PreferenceCollator(0))
    plain = PreferenceCollator(0)(list(dataset))
    assert torch.equal(batch["preferred_seq"], plain["preferred_seq"])
    assert torch.equal(batch["seq_mask"][1], plain["seq_mask"][1])


@pytest.mark.pitfall(7)
def test_a_side_of_padding_alone_has_no_token() -> None:
    nothing, something = torch.full((2,), -100), torch.tensor([1, 2])
    batch = PreferenceCollator(-100)([item(nothing, something, torch.tensor([True, False]))])
    assert batch["preferred_seq"].tolist() == [[0]] and not batch["seq_mask"][0].any()
    assert not batch["prompt_mask"][0].any()


@pytest.mark.pitfall(11)
@pytest.mark.parametrize("pad", ["<pad>", "</s>", None])
def test_pad_that_is_eos_masks_no_eos(tmp_path: Path, pad: str | None) -> None:
    tokenizer = HuggingFaceTokenizer.load(tiny.save_tokenizer(tmp_path / "tokenizer", pad=pad))
    path = write_rows(
        tmp_path / "a.jsonl", [{"prompt": "Hello", "chosen": "there", "rejected": "there, how are you?"}]
    )
    dataset = PreferenceDataset.from_file(path, tokenizer)
    batch = PreferenceCollator(dataset.pad_id)(list(dataset))
    for index, name in enumerate(("preferred_seq", "unpreferred_seq")):
        scored = batch["seq_mask"][index] & ~batch["prompt_mask"][index]
        scored_ids = batch[name][scored].tolist()
        assert scored_ids[-1] == 1 and scored_ids.count(1) == 1
        assert batch[name][0, 0] == 0


def test_a_pad_inside_a_side_is_a_token() -> None:
    batch = PreferenceCollator(0)(list(PreferenceDataset([TokenizedExample((1, 0, 0), ((0, 2), (3,)))], 0)))
    assert batch["preferred_seq"].tolist() == [[1, 0, 0, 0, 2]] and batch["seq_mask"][0].all()


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "there should be at least one item, but there is none: leave the batch out"),
        (
            [item(torch.tensor([1, 2]), torch.tensor([1]), torch.tensor([True]))],
            r"of one length.*but it has \(2,\) torch.int64",
        ),
        (
            [item(torch.tensor([1]), torch.tensor([1]), torch.tensor([1]))],
            "item 0 should have .* integers, integers and bool, but it has",
        ),
        (
            [item(torch.tensor([1.0]), torch.tensor([1]), torch.tensor([True]))],
            "float32.*: collate the items of a",
        ),
        (
            [item(torch.tensor([[1]]), torch.tensor([[1]]), torch.tensor([[True]]))],
            r"but it has \(1, 1\) torch.int64",
        ),
        (
            [(torch.tensor([1]), torch.tensor([1]), torch.tensor([True]))],
            "should have preferred_seq, unpreferred_seq, prompt_mask of one length.* it has tuple: collate",
        ),
        (
            [{"preferred_seq": torch.tensor([1]), "prompt_mask": torch.tensor([True])}],
            r"but it has \(1,\) torch.int64, NoneType, \(1,\) torch.bool: collate",
        ),
        ([item([1], [1], [True])], "item 0 should have .*, but it has list, list, list"),
        (
            [item(torch.tensor([9, 1]), torch.tensor([1, 2]), torch.tensor([True, False]))],
            "should begin with a token, but it begins with the pad_id 9: pad items on the right",
        ),
    ],
)
def test_items_that_cannot_be(items: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceCollator(9)(items)


def test_padding_side() -> None:
    with pytest.raises(
        ValueError, match="padding_side should be 'right' or 'left', but it is 'both': choose one"
    ):
        PreferenceCollator(0, padding_side="both")  # type: ignore[arg-type]


# tokenized examples to batches


def test_groups_hold_so_many_unique_tokens_and_keep_prompts_together() -> None:
    def pair(prompt: tuple[int, ...], chosen: int, rejected: int) -> TokenizedExample:
        return TokenizedExample(prompt, ((7,) * chosen, (8,) * rejected))

    pairs = [pair((1, 2, 3), 4, 4), pair((5,), 2, 2), pair((1, 2, 3), 1, 1), pair((1, 2, 4), 3, 3)]
    # 11 and then 2 more, 7 with the prompt's last token; 5 on its own
    assert group_by_tokens(pairs, 1000) == [[0, 2, 3, 1]]
    assert group_by_tokens(pairs, 20) == [[0, 2, 3], [1]]
    assert group_by_tokens(pairs, 13) == [[0, 2], [3], [1]]
    assert group_by_tokens(pairs, 1) == [[0], [2], [3], [1]]
    documents = [TokenizedExample((), (ids,)) for ids in ((1, 2, 3, 4), (5, 6), (1, 2, 3, 7, 8))]
    assert group_by_tokens(documents, 8) == [[0, 2, 1]]  # 4 tokens, 2 more after those in common, and 2
    assert group_by_tokens(documents, 7) == [[0, 2], [1]]


def test_padded_groups_hold_so_many_tokens_with_their_padding() -> None:
    def pair(prompt: int, chosen: int, rejected: int) -> TokenizedExample:
        return TokenizedExample((1,) * prompt, ((7,) * chosen, (8,) * rejected))

    pairs = [pair(1, 1, 1), pair(5, 5, 2), pair(2, 1, 2), pair(1, 2, 8)]  # 2, 10, 4 and 9 tokens wide
    assert group_by_tokens(pairs, 1000, is_padded=True) == [[1, 3, 2, 0]]
    assert group_by_tokens(pairs, 60, is_padded=True) == [[1, 3, 2], [0]]
    assert group_by_tokens(pairs, 40, is_padded=True) == [[1, 3], [2, 0]]
    assert group_by_tokens(pairs, 15, is_padded=True) == [[1], [3], [2], [0]]
    for max_tokens in range(1, 100):
        for sequences in scored_sequences(pairs, max_tokens, is_padded=True):
            assert sequences.ids.numel() <= max_tokens or len(sequences.ids) == 2


def token_ids(sequences: ScoredSequences) -> list[tuple[list[int], list[int]]]:
    """Each sequence's inputs and its scored tokens."""
    targets = sequences.target.split(sequences.length.tolist())
    return [(ids.tolist(), y.tolist()) for ids, y in zip(sequences.unpadded_rows(), targets, strict=True)]


def test_scored_sequences_are_all_of_the_examples() -> None:
    examples = [
        TokenizedExample((5, 6), ((7,), (8, 9))),
        TokenizedExample((1, 2), ((3, 4), (5,), (6,))),
        TokenizedExample((1, 3), ((4,),), True, kl_completion=(8, 9)),
    ]
    ranked = [([1, 2, 3], [3, 4]), ([1, 2], [5]), ([1, 2], [6])]
    labelled = [([1, 3], [4]), ([1, 3, 8], [8, 9])]
    pair = [([5, 6], [7]), ([5, 6, 8], [8, 9])]
    assert [token_ids(group) for group in scored_sequences(examples, 1000)] == [ranked + labelled + pair]
    assert [token_ids(group) for group in scored_sequences(examples, 8)] == [ranked + labelled, pair]
    assert [token_ids(group) for group in scored_sequences(examples, 1)] == [ranked, labelled, pair]


def test_batches_of_every_type() -> None:
    pairs = [
        TokenizedExample((1, 2), ((3, 4), (5,)), weight=2.0),
        TokenizedExample((6,), ((7,), (8,)), margin=0.5),
    ]
    batch = collate_preference(pairs)
    assert token_ids(batch.sequences) == [([1, 2, 3], [3, 4]), ([6], [7]), ([1, 2], [5]), ([6], [8])]
    assert batch.weights is not None and batch.weights.tolist() == [2.0, 1.0]
    assert batch.margins is not None and batch.margins.tolist() == [0.0, 0.5]
    ranked = collate_ranked([pairs[0], TokenizedExample((6,), ((7,), (8,), (9,)))])
    assert ranked.ranks.tolist() == [[0, 1, -1], [2, 3, 4]]
    assert ranked.weights is not None and ranked.weights.tolist() == [2.0, 1.0]
    labelled = [
        TokenizedExample((6,), ((7,),), False, kl_completion=(3,)),
        TokenizedExample((1,), ((2,),), True),
    ]
    unpaired = collate_unpaired(labelled)
    assert unpaired.label.tolist() == [False, True] and unpaired.weights is None
    assert token_ids(unpaired.kl_sequences) == [([6], [3]), ([], [])]
    sft = collate_sft([pairs[0].as_document(), labelled[1].as_document()])
    assert token_ids(sft.sequences) == [([1, 2, 3], [2, 3, 4]), ([1], [2])]
    masked = TokenizedExample((1, 2), ((3, 4, 5),), scored=((False, True, False, True, False),))
    sft = collate_sft([TokenizedExample((6,), ((7, 8),)), TokenizedExample((), ((6, 7, 8),)), masked])
    assert token_ids(sft.sequences) == [([6, 7], [7, 8]), ([6, 7], [7, 8]), ([1, 2, 3], [2, 4])]


def test_batches_come_with_trees_where_they_are_wanted() -> None:
    examples = [TokenizedExample((1, 2), ((3,),), True, kl_completion=(4,)) for _ in range(2)]
    for collate in (*COLLATE_FNS.values(), collate_sft):
        pairs = [TokenizedExample((1, 2), ((3,), (4,)))]
        batch = collate(
            examples if collate in (collate_unpaired, collate_sft) else pairs, tree_options=TreeOptions()
        )
        assert list(vars(batch.sequences)["_trees"]) == [TreeOptions()]
        assert "_trees" not in vars(collate(pairs).sequences)


def test_scored_turns_reach_every_kind_of_batch() -> None:
    """A completion of two answers with a question between them, whose tokens are not scored."""
    masks = ((False, True, True, False, True), (False, True, True))
    pair = TokenizedExample((1, 2), ((3, 9, 4), (5,)), scored=masks)
    plain = TokenizedExample((1,), ((6, 7), (8,)))

    def targets(sequences: ScoredSequences) -> list[list[int]]:
        return [ids.tolist() for ids in sequences.target.split(sequences.length.tolist())]

    batch = COLLATE_FNS["preference"]([pair, plain])
    assert targets(batch.sequences) == [[2, 3, 4], [6, 7], [2, 5], [8]]
    ranked = COLLATE_FNS["ranked"]([pair, plain])
    assert targets(ranked.sequences) == [[2, 3, 4], [2, 5], [6, 7], [8]]
    labelled = TokenizedExample((1, 2), ((3, 9, 4),), True, scored=masks[:1], kl_completion=(8, 8))
    unpaired = COLLATE_FNS["unpaired_preference"]([labelled])
    assert targets(unpaired.sequences) == [[2, 3, 4]] and targets(unpaired.kl_sequences) == [[8, 8]]
    whole = scored_sequences([pair, labelled], 1000)
    assert targets(whole[0]) == [[2, 3, 4], [2, 5], [2, 3, 4], [8, 8]]

    items = PreferenceDataset([pair, plain], -100)
    collated = PreferenceCollator(-100)([items[0], items[1]])
    seqs = (collated["preferred_seq"], collated["unpreferred_seq"])
    padded = PreferenceBatch.from_padded(seqs, collated["prompt_mask"], collated["seq_mask"], None, None)
    assert targets(padded.sequences) == [[2, 3, 4], [6, 7], [2, 5], [8]]
