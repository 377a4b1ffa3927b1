"""Pairs, ranked lists and completions with a label become what a loss learns from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_wrapper import DPO
from dpo_wrapper.data import (
    ByteTokenizer,
    Example,
    ExampleError,
    Fields,
    TokenizedExample,
    check_ranking,
    convert_examples,
    read_examples,
    to_example,
    tokenize_examples,
)
from dpo_wrapper.data.collate import COLLATE_FNS, add_kl_completions
from dpo_wrapper.data.tokens.encoded import EncodedExample
from dpo_wrapper.losses import KTO, PlackettLuce, Sigmoid
from helpers.datasets import tokenize_example
from helpers.models import ZOO

BYTES = ByteTokenizer()
BOS, EOS = BYTES.bos_id, BYTES.eos_id
PAIR = Example("P", ("A", "B"), weight=2.0, margin=0.5, split="test", source="f, line 1")
RANKED = Example("Q", ("A", "B", "C"), weight=3.0, source="f, line 2")
LABELLED = Example("R", ("A",), True, source="f, line 3")


def convert(*arguments: Any) -> list[Example]:
    converted, errors = convert_examples(*arguments)
    assert not errors
    return converted


def test_pairs_and_ranked_lists_become_pairs() -> None:
    def pair(chosen: str, rejected: str) -> Example:
        return Example("Q", (chosen, rejected), weight=3.0, source="f, line 2")

    pairs = [pair("A", "B"), pair("A", "C"), pair("B", "C")]
    assert convert([PAIR, RANKED], "preference") == convert([PAIR, RANKED], "preference", "all")
    assert convert([PAIR, RANKED], "preference") == [PAIR, *pairs]
    assert convert([PAIR, RANKED], "preference", "best") == [PAIR, *pairs[:2]]


def test_pairs_are_ranked_lists_and_become_two_completions_with_a_label() -> None:
    pair = Example("P", ("A", "B"), weight=2.0, split="test", source="f, line 1")
    assert convert([pair, RANKED], "ranked") == [pair, RANKED]
    labelled = [
        Example("P", (text,), label, weight=2.0, split="test", source="f, line 1")
        for text, label in (("A", True), ("B", False))
    ]
    assert convert([pair, LABELLED], "unpaired_preference") == [*labelled, LABELLED]


@pytest.mark.parametrize(
    ("example", "dataset_type", "message"),
    [
        (LABELLED, "preference", "line 3: a row should have two completions or more, but it has one with"),
        (
            LABELLED,
            "ranked",
            "line 3: a row should have two completions or more, but it has one with a label: write",
        ),
        (
            RANKED,
            "unpaired_preference",
            "line 2: a row should have one completion .* a ranked list of 3: give each a label",
        ),
        (
            PAIR,
            "ranked",
            "line 1: the margin should be that of a pair, but it is 0.5 for other data: leave it",
        ),
        (PAIR, "unpaired_preference", "line 1: the margin should be that of a pair, but it is 0.5 for other"),
        (
            Example("Q", ("A", "B", "C"), margin=0.5),
            "preference",
            "^the margin should be that of a pair, but",
        ),
    ],
)
def test_what_cannot_be_converted(example: Example, dataset_type: Any, message: str) -> None:
    with pytest.raises(ExampleError, match=message):
        convert_examples([example], dataset_type)
    good = {"preference": PAIR, "ranked": RANKED, "unpaired_preference": LABELLED}[dataset_type]
    converted, (error,) = convert_examples([good, example], dataset_type, on_error="skip")
    assert converted == [good] and str(error).endswith(".")
    with pytest.raises(ValueError, match="on_error should be 'raise' or 'skip', but it is 'warn'"):
        convert_examples([good], dataset_type, on_error="warn")  # type: ignore[arg-type]


def test_a_ranking_without_effect_is_refused() -> None:
    check_ranking("best", "preference", has_lists=True)
    check_ranking(None, "ranked", has_lists=False)
    with pytest.raises(
        ValueError, match="it is 'best' and no row has more than two completions: leave the ra"
    ):
        check_ranking("best", "preference", has_lists=False)
    with pytest.raises(ValueError, match="it is 'all' and the loss takes ranked data: leave the ranking out"):
        check_ranking("all", "ranked", has_lists=True)


def test_tokens_of_a_ranked_list() -> None:
    example = to_example({"prompt": "abcdef", "completions": ["xyz", "w", ""]})
    tokens = tokenize_example(example, BYTES, 32)
    assert tokens.prompt == (BOS, *b"abcdef")
    assert tokens.completions == ((*b"xyz", EOS), (*b"w", EOS), (EOS,))
    short = tokenize_example(example, BYTES, 9)  # the prompt gives way, alike for all
    assert short.prompt == (BOS, *b"cdef") and short.completions == tokens.completions


def test_what_supervised_training_learns() -> None:
    assert TokenizedExample((1,), ((2,), (3,), (4,))).sft_completion == (2,)
    assert TokenizedExample((1,), ((2,),), True).sft_completion == (2,)
    assert TokenizedExample((1,), ((2,),), False).sft_completion is None


RECORDS = [
    {"prompt": "P", "chosen": "A", "rejected": "B", "split": "test"},
    {"prompt": "Q", "completions": ["A", "B", "C"], "weight": 2.0},
    {"prompt": "R", "completion": "A", "label": True, "split": "train"},
]


def test_rows_of_every_kind_in_one_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ("prompt", "chosen", "rejected", "completions", "completion", "label", "weight", "split")
    table = pa.table({name: [record.get(name) for record in RECORDS] for name in columns})  # type: ignore[attr-defined]
    pq.write_table(table, tmp_path / "rows.parquet")
    read = read_examples(tmp_path / "rows.parquet")
    examples, errors = read.examples, read.errors
    assert not errors
    pairs, errors = convert_examples(examples, "preference", on_error="skip")
    assert [(x.prompt, *x.completions, x.weight, x.split) for x in pairs] == [
        ("P", "A", "B", None, "test"),
        ("Q", "A", "B", 2.0, None),
        ("Q", "A", "C", 2.0, None),
        ("Q", "B", "C", 2.0, None),
    ]
    assert len(errors) == 1 and "rows.parquet, row 3: a row should have two completions or more, but" in str(
        errors[0]
    )
    best, _ = convert_examples(examples, "preference", "best", on_error="skip")
    assert [x.completions[1] for x in best] == ["B", "B", "C"]
    ranked, _ = convert_examples(examples, "ranked", on_error="skip")
    assert [(x.completions, x.weight, x.split) for x in ranked] == [
        (("A", "B"), None, "test"),
        (("A", "B", "C"), 2.0, None),
    ]
    labelled, _ = convert_examples(examples, "unpaired_preference", on_error="skip")
    assert [(x.prompt, x.completions, x.label) for x in labelled] == [
        ("P", ("A",), True),
        ("P", ("B",), False),
        ("R", ("A",), True),
    ]
    tokenized = add_kl_completions(tokenize_examples(labelled, BYTES, 8).examples, 8)
    assert [x.kl_completion for x in tokenized if x.prompt == (BOS, *b"P")].count(()) <= 1


def test_a_file_of_one_record_and_other_names_of_the_prompt(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"prompt": "Q", "completions": ["A", "B"]}))
    read = read_examples(path)
    (example,) = read.examples
    assert example.completions == ("A", "B")
    path.write_text(json.dumps({"question": "Q", "completion": "A", "label": True}))
    read = read_examples(path, Fields(prompt="question"))
    (example,) = read.examples
    assert (example.prompt, example.completions, example.label) == ("Q", ("A",), True)


@pytest.mark.parametrize(
    ("dataset_type", "loss"),
    [("preference", Sigmoid()), ("ranked", PlackettLuce()), ("unpaired_preference", KTO())],
)
def test_files_to_losses(tmp_path: Path, dataset_type: Any, loss: Any) -> None:
    policy, reference = (ZOO["xt-rotary"](seed) for seed in range(2))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [*RECORDS, {"prompt": 1, "completion": 2, "label": True}])))
    with pytest.raises(ExampleError, match=r"rows.jsonl, line 4, field 'completion'"):
        read_examples(path)
    read = read_examples(path, on_error="skip")
    examples, errors = read.examples, read.errors
    assert len(examples) == 3 and len(errors) == 1

    class Small(ByteTokenizer):
        """37 ids, as many as the models have."""

        def encode_example(self, *arguments: Any) -> EncodedExample:
            encoded = super().encode_example(*arguments)
            prompt, *completions = ([t % 37 for t in ids] for ids in (encoded.prompt, *encoded.completions))
            return EncodedExample(prompt, completions)

    converted, errors = convert_examples(examples, dataset_type, on_error="skip")
    assert len(errors) == 1
    tokenized = add_kl_completions(tokenize_examples(converted, Small(), 16).examples, 16)
    batch = COLLATE_FNS[dataset_type](tokenized)
    assert DPO(policy, loss=loss, reference=reference)(batch).isfinite()
    if dataset_type == "unpaired_preference":
        assert batch.label.equal(torch.tensor([True, False, True]))


def test_kl_completions_are_of_other_prompts_and_fit() -> None:
    texts = ("x", "yy", "z" * 9, "")
    examples = [Example(prompt, (text,), True) for prompt, text in zip("ABCD", texts, strict=True)]
    tokenized = tokenize_examples(examples, BYTES, 8, allow_empty=True).examples
    for seed in range(4):
        completed = add_kl_completions(tokenized, 8, seed)
        assert len(completed) == 4
        # each once, none longer than its place
        kl_completions = sorted(example.kl_completion for example in completed)
        assert kl_completions == sorted(example.completions[0] for example in completed)
        for example in completed:
            assert example.kl_completion != example.completions[0]
            assert len(example.prompt) + len(example.kl_completion) <= 8
    assert len({tuple(x.kl_completion for x in add_kl_completions(tokenized, 8, s)) for s in range(9)}) > 1
    pairs = tokenize_examples([PAIR], BYTES, 8).examples
    assert add_kl_completions(pairs, 8) == pairs  # only labelled examples get one
