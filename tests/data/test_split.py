"""Training and evaluation parts: no prompt in both, the same in every process and order."""

import os
import random
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_wrapper.data import ByteTokenizer, Example, Message, split_examples


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=40).filter(lambda keys: len(set(keys)) > 1),
    st.floats(0.01, 0.99),
    st.integers(0, 2**40),
    st.randoms(use_true_random=False),
)
def test_no_prompt_on_both_sides_whatever_the_order(
    keys: list[int], fraction: float, seed: int, shuffle: random.Random
) -> None:
    examples = [Example(f"prompt {key}", (str(i), "B")) for i, key in enumerate(keys)]
    train, test = split_examples(examples, fraction, seed)
    assert train and test and sorted(train + test, key=examples.index) == examples
    assert not {example.prompt for example in train} & {example.prompt for example in test}
    assert train == [example for example in examples if example in train]
    mixed = examples.copy()
    shuffle.shuffle(mixed)
    again = split_examples(mixed, fraction, seed)
    assert [sorted(part, key=examples.index) for part in again] == [train, test]


def test_about_the_fraction_is_for_evaluation() -> None:
    examples = [Example(f"prompt {i // 3}", (str(i), "B")) for i in range(3000)]
    for fraction in (0.01, 0.1, 0.5, 0.9):
        assert abs(len(split_examples(examples, fraction)[1]) / 3000 - fraction) < 0.001
    assert split_examples(examples, 0.1, 0) != split_examples(examples, 0.1, 1)
    assert split_examples(examples, 0) == (examples, [])


def test_one_huge_prompt_does_not_swallow_the_training_part() -> None:
    examples = [Example("huge", (str(i), "B")) for i in range(98)] + [
        Example("small", ("A", "B")),
        Example("other", ("A", "B")),
    ]
    for seed in range(20):
        assert len(split_examples(examples, 0.05, seed)[1]) in (1, 2)


def test_text_and_the_dialogue_of_that_question_are_one_prompt() -> None:
    examples = [
        Example("Q", ("A", "B")),
        Example((Message("user", "Q"),), ("C", "D")),
        Example("R", ("A", "B")),
    ]
    train, test = split_examples(examples, 0.4)
    assert {len(train), len(test)} == {1, 2} and examples[2] in min(train, test, key=len)


def test_examples_with_a_split() -> None:
    examples = [
        Example("Q", ("A", "B")),
        Example("R", ("A", "B"), split="test"),
        Example("S", ("A", "B"), split="train"),
    ]
    for fraction in (0, 0.5):
        assert split_examples(examples, fraction) == ([examples[0], examples[2]], [examples[1]])
    assert split_examples([examples[2]], 0) == ([examples[2]], [])


@pytest.mark.parametrize(
    ("examples", "fraction", "message"),
    [
        ([], 0.1, "there should be examples to split, but there are none: read some first"),
        (
            [Example("Q", ("A", "B"), split="test")],
            0.1,
            "some rows should be for training, but all are marked as test: mark",
        ),
        (
            [Example("Q", ("A", "B"), split="train")],
            0.1,
            "some rows should be for evaluation, but all are marked as train: mark",
        ),
        (
            [Example("Q", ("A", "B")), Example("Q", ("C", "B"))],
            0.1,
            "there should be at least two different prompts.*but there is one: add",
        ),
        (
            [Example("Q", ("A", "B"))],
            1,
            r"the fraction should be in \[0, 1\), but it is 1: take 0.1 for a tenth",
        ),
        ([Example("Q", ("A", "B"))], -0.1, r"the fraction should be in \[0, 1\), but it is -0.1"),
        ([Example("Q", ("A", "B"))], float("nan"), r"the fraction should be in \[0, 1\), but it is nan"),
        ([Example("Q", ("A", "B"))], "0.1", r"the fraction should be in \[0, 1\), but it is '0.1'"),
    ],
)
def test_splits_that_cannot_be(examples: list[Example], fraction: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_examples(examples, fraction)


@pytest.mark.slow
def test_another_process_splits_alike_and_loads_no_extra_library() -> None:
    code = (
        "import sys\n"
        "from dpo_wrapper.data import ByteTokenizer, Example, split_examples\n"
        "assert not {'transformers', 'tokenizers', 'pyarrow', 'datasets'} & set(sys.modules)\n"
        "examples = [Example(f'prompt {i}', ('A', 'B')) for i in range(40)]\n"
        "prompts = [example.prompt for example in split_examples(examples, 0.2, 7)[1]]\n"
        "print(prompts, ByteTokenizer().fingerprint())\n"
    )
    env = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout
    examples = [Example(f"prompt {i}", ("A", "B")) for i in range(40)]
    test = [example.prompt for example in split_examples(examples, 0.2, 7)[1]]
    assert len(test) == 8 and out.strip() == f"{test} {ByteTokenizer().fingerprint()}"


def test_ids_of_messages_make_no_other_prompt() -> None:
    examples = [Example((Message("user", f"Q{k % 5}", {"id": k}),), ("A", "B")) for k in range(40)]
    train, test = ({e.prompt[0].text for e in part} for part in split_examples(examples, 0.2))
    assert train and test and not train & test
