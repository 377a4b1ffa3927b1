"""What tells the sides of a comparison apart, and what does not."""

from dataclasses import replace

import numpy as np
import pytest

from dpo_wrapper.data import Example, Message
from dpo_wrapper.data.lint import find_problems
from dpo_wrapper.data.lint.findings import MAX_ROWS, MIN_ROWS
from helpers.lint_rows import change, find, is_problem, label_rows, make_pairs, measure, pick

PAIRS = make_pairs(200)
FEATURES = measure(PAIRS)


@pytest.mark.parametrize(
    ("differences", "is_biased"),
    [
        ([1] * 75 + [-1] * 25, True),  # mean 0.5, deviation √0.75, effect 0.58
        ([10] * 59 + [-1] * 41, False),  # effect 1.0, but too few are longer
        ([10] * 60 + [-1] * 40, True),
        ([1] * 64 + [-1] * 36, False),  # effect 0.28 / √(1 - 0.28²) = 0.29
        ([1] * 65 + [-1] * 35, True),  # effect 0.30 / √(1 - 0.30²) = 0.31
        ([-1] * 75 + [1] * 25, False),  # chosen is shorter
        ([5] * 100, True),  # no deviation
        ([1] * (MIN_ROWS - 1), False),  # too few pairs
    ],
)
def test_length_bias(differences: list[int], is_biased: bool) -> None:
    lengths = np.full(len(differences), 20, np.int32)
    features = {name: values[: len(differences)] for name, values in FEATURES.items()}
    features |= {"rejected_length": lengths, "chosen_length": lengths + differences}
    finding = pick(find_problems(features, {}), "length_bias")
    assert is_problem(finding) == is_biased
    if len(differences) < MIN_ROWS:
        return
    assert finding.numbers["longer"] == pytest.approx(np.mean(np.array(differences) > 0))
    assert finding.numbers["mean"] == pytest.approx(np.mean(differences))
    deviation = max(float(np.std(differences)), 1.0)
    assert finding.numbers["paired_effect"] == pytest.approx(np.mean(differences) / deviation)
    # the lengths of chosen vary as the differences do, those of rejected not at all
    pooled = max(float(np.sqrt(np.var(differences) / 2)), 1.0)
    assert finding.numbers["cohens_d"] == pytest.approx(np.mean(differences) / pooled)


def test_pairs_that_differ_in_white_space_alone() -> None:
    def make_examples(*sides: tuple[str, str]) -> list[Example]:
        return [Example("Q", pair) for pair in sides]

    same = make_examples(("a b", "a  b\n"), ("ab c", "a bc"), (" " + "x " * 99, "x" * 99))
    others = make_examples(("a b", "a b."), ("A b", "a b"), ("", "a"), ("a", "a"), ("x" * 70, "x" * 71))
    finding = find([*others, *same], "equal_sides")
    assert is_problem(finding) and finding.rows == (5, 6, 7) and finding.numbers == {"rows": 3}
    assert find(others, "equal_sides") is None
    assert find(label_rows(same, 2), "equal_sides") is None


def test_white_space_that_one_side_begins_with() -> None:
    finding = find(change(PAIRS[:50], range(10), chosen=" {}"), "leading_space")
    assert is_problem(finding) and finding.rows == tuple(range(MAX_ROWS))
    assert finding.numbers == {"chosen": 0.2, "rejected": 0.0}
    assert find(change(PAIRS[:50], range(9), chosen=" {}"), "leading_space") is None
    assert find(change(PAIRS[:50], range(50), " {}", "\n{}"), "leading_space") is None
    labelled = label_rows(change(PAIRS, range(150, 180), chosen=" {}"), 100)
    finding = find(labelled, "leading_space")
    assert finding.numbers == {"desirable": 0.0, "undesirable": 0.3} and finding.rows[0] == 150


def test_openings_that_one_side_has() -> None:
    finding = find(change(PAIRS[:100], range(40, 50), rejected="Sure, I can do. {}"), "opening")
    assert is_problem(finding) and finding.rows == (40, 41, 42, 43, 44)
    assert finding.numbers == {"opening": "Sure, I can", "chosen": 0.0, "rejected": 0.1}
    assert "“Sure, I can” begins 0.0% of chosen and 10.0% of rejected" in finding.sentence
    assert find(change(PAIRS[:100], range(9), rejected="Sure, I can do. {}"), "opening") is None
    one_word = find(change(PAIRS[:100], range(20), chosen="Certainly {}"), "opening")
    assert one_word.numbers["opening"] == "Certainly" and one_word.numbers["chosen"] == 0.2
    examples = change(PAIRS[:100], range(50), chosen="Yes. {}")
    assert is_problem(
        find(change(examples, range(50, 60), rejected="Yes. {}"), "opening")
    )  # 5 times as often
    assert find(change(examples, range(50, 61), rejected="Yes. {}"), "opening") is None
    labelled = label_rows(change(PAIRS, range(100), chosen="当然可以！我们 {}"), 100)
    assert find(labelled, "opening").numbers["opening"] == "当然可以！…"


def test_sides_that_repeat_the_prompt() -> None:
    prompt = "What is the answer to this?"
    examples = [replace(example, prompt=prompt) for example in PAIRS[:100]]
    finding = find(change(examples, range(3, 8), rejected=prompt + "\n{}"), "repeated_prompt")
    assert is_problem(finding) and finding.rows == (3, 4, 5, 6, 7)
    assert finding.numbers == {"chosen": 0.0, "rejected": 0.05}
    assert not find(change(examples, range(4), rejected=prompt + "{}"), "repeated_prompt").is_problem
    turns = (Message("user", "Hm?"), Message("assistant", "Yes."), Message("user", prompt))
    dialogues = change([replace(example, prompt=turns) for example in examples], range(100), prompt + "{}")
    assert find(dialogues, "repeated_prompt").numbers["chosen"] == 1.0
    short = change(
        [replace(example, prompt="What is it?") for example in examples], range(99), "What is it?{}"
    )
    assert find(short, "repeated_prompt") is None
