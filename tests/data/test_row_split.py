"""Training and held-out parts: no prompt in both, the same in every process and order."""

import os
import random
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_wrapper.data import ByteTokenizer, Message, Row, split_rows


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=40).filter(lambda keys: len(set(keys)) > 1),
    st.floats(0.01, 0.99),
    st.integers(0, 2**40),
    st.randoms(use_true_random=False),
)
def test_no_prompt_on_both_sides_whatever_the_order(
    keys: list[int], fraction: float, seed: int, shuffle: random.Random
) -> None:
    rows = [Row(f"prompt {key}", str(i), "B") for i, key in enumerate(keys)]
    train, held = split_rows(rows, fraction, seed)
    assert train and held and sorted(train + held, key=rows.index) == rows
    assert not {row.prompt for row in train} & {row.prompt for row in held}
    assert train == [row for row in rows if row in train]
    mixed = rows.copy()
    shuffle.shuffle(mixed)
    again = split_rows(mixed, fraction, seed)
    assert [sorted(part, key=rows.index) for part in again] == [train, held]


def test_about_the_fraction_is_held_out() -> None:
    rows = [Row(f"prompt {i // 3}", str(i), "B") for i in range(3000)]
    for fraction in (0.01, 0.1, 0.5, 0.9):
        assert abs(len(split_rows(rows, fraction)[1]) / 3000 - fraction) < 0.001
    assert split_rows(rows, 0.1, 0) != split_rows(rows, 0.1, 1)
    assert split_rows(rows, 0) == (rows, [])


def test_one_huge_prompt_does_not_swallow_the_training_part() -> None:
    rows = [Row("huge", str(i), "B") for i in range(98)] + [Row("small", "A", "B"), Row("other", "A", "B")]
    for seed in range(20):
        assert len(split_rows(rows, 0.05, seed)[1]) in (1, 2)


def test_text_and_the_dialogue_of_that_question_are_one_prompt() -> None:
    rows = [Row("Q", "A", "B"), Row((Message("user", "Q"),), "C", "D"), Row("R", "A", "B")]
    train, held = split_rows(rows, 0.4)
    assert {len(train), len(held)} == {1, 2} and rows[2] in min(train, held, key=len)


def test_rows_that_say_their_split() -> None:
    rows = [Row("Q", "A", "B"), Row("R", "A", "B", "test"), Row("S", "A", "B", "train")]
    for fraction in (0, 0.5):
        assert split_rows(rows, fraction) == ([rows[0], rows[2]], [rows[1]])
    assert split_rows([rows[2]], 0) == ([rows[2]], [])


@pytest.mark.parametrize(
    ("rows", "fraction", "message"),
    [
        ([], 0.1, "expected rows to split, got none; read some first"),
        (
            [Row("Q", "A", "B", "test")],
            0.1,
            "expected rows to train on, got only rows marked as held out; mark",
        ),
        (
            [Row("Q", "A", "B", "train")],
            0.1,
            "expected rows to hold out, got only rows marked for training; mark",
        ),
        (
            [Row("Q", "A", "B"), Row("Q", "C", "B")],
            0.1,
            "expected at least two different prompts.*got one; add",
        ),
        ([Row("Q", "A", "B")], 1, "expected a fraction from 0 to below 1, got 1; 0.1 holds out a tenth"),
        ([Row("Q", "A", "B")], -0.1, "expected a fraction from 0 to below 1, got -0.1"),
        ([Row("Q", "A", "B")], float("nan"), "expected a fraction from 0 to below 1, got nan"),
        ([Row("Q", "A", "B")], "0.1", "expected a fraction from 0 to below 1, got '0.1'"),
    ],
)
def test_splits_that_cannot_be(rows: list[Row], fraction: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_rows(rows, fraction)


def test_another_process_splits_alike_and_loads_no_extra_library() -> None:
    code = (
        "import sys\n"
        "from dpo_wrapper.data import ByteTokenizer, Row, split_rows\n"
        "assert not {'transformers', 'tokenizers', 'pyarrow', 'datasets'} & set(sys.modules)\n"
        "rows = [Row(f'prompt {i}', 'A', 'B') for i in range(40)]\n"
        "print([row.prompt for row in split_rows(rows, 0.2, 7)[1]], ByteTokenizer().fingerprint())\n"
    )
    env = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout
    rows = [Row(f"prompt {i}", "A", "B") for i in range(40)]
    held = [row.prompt for row in split_rows(rows, 0.2, 7)[1]]
    assert len(held) == 8 and out.strip() == f"{held} {ByteTokenizer().fingerprint()}"
