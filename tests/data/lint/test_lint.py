"""What is found in rows that deserve it, and not in rows that do not."""

import json
import random
from dataclasses import replace
from typing import Any

import numpy as np

from dpo_wrapper.data import Example, Message, TokenizedExample, read_examples
from dpo_wrapper.data.lint import find_problems, format_findings, measure_rows
from dpo_wrapper.data.lint.findings import MIN_ROWS
from helpers.lint_rows import find, is_problem, label_rows, make_pairs, measure, pick, tokenize, write_words
from helpers.runs import BUNDLED

PAIRS = make_pairs(200)
FEATURES = measure(PAIRS)


def test_nothing_is_wrong_with_random_pairs() -> None:
    findings = find_problems(FEATURES, {"read": 200, "written": 200})
    assert [finding.name for finding in findings] == ["length_bias", "prefix_sharing"]
    assert not any(map(is_problem, findings))


def test_nothing_is_wrong_with_the_bundled_data() -> None:
    examples = read_examples(BUNDLED).examples
    assert len(examples) == 600
    assert not any(map(is_problem, find_problems(measure(examples), {"read": 600})))


def test_contradictions() -> None:
    pairs, listed = PAIRS[:4], [Example("Q", ("a", "b", "c")), Example("Q", ("b", "a", "c"))]
    turned = replace(pairs[1], completions=pairs[1].completions[::-1])
    finding = find([*pairs, turned, *listed], "contradictions")
    assert is_problem(finding) and set(finding.rows) == {1, 4, 5, 6}
    assert finding.numbers == {"rows": 4, "groups": 2}
    labelled = [Example("Q", ("a",), label=True), Example("Q", ("a",), label=False)]
    assert find(labelled, "contradictions").rows == (0, 1)
    other_prompt = replace(turned, prompt="Another one?")
    other_text = Example(turned.prompt, ("a", "b"))
    other_answer = replace(labelled[1], completions=("b",))
    assert (
        find([*pairs, pairs[1], other_prompt, other_text, labelled[0], other_answer], "contradictions")
        is None
    )


def test_duplicates() -> None:
    finding = find([*PAIRS[:99], replace(PAIRS[7], weight=2.0, source="b")], "duplicates")
    assert is_problem(finding) and finding.rows == (99,) and finding.numbers == {"rows": 1, "share": 0.01}
    assert not find([*PAIRS[:100], PAIRS[7]], "duplicates").is_problem
    assert find(PAIRS, "duplicates") is None
    assert find([*PAIRS, PAIRS[3]], "near_duplicates") is None
    tools = replace(PAIRS[0], prompt=(Message("user", "Q"),))
    assert find([tools, replace(tools, tools=({"name": "f"},))], "duplicates") is None


def test_near_duplicates() -> None:
    generator = random.Random(1)
    sides = (write_words(generator, 150), write_words(generator, 150))
    example = Example("Tell me of them, at some length?", sides)
    near = replace(example, completions=(sides[0] + " And more.", sides[1]))
    finding = find([*PAIRS[:50], example, near], "near_duplicates")
    assert is_problem(finding) and finding.rows == (50, 51) and finding.numbers["rows"] == 1
    others = [
        replace(near, prompt="Is it so that the answer says nothing?"),
        replace(near, completions=near.completions[::-1]),
        replace(near, completions=(sides[0], write_words(generator, 150))),
    ]
    for other in others:
        assert find([*PAIRS[:50], example, other], "near_duplicates") is None
    assert not find([*PAIRS, example, near], "near_duplicates").is_problem


def test_short_rows_are_near_duplicates_if_their_words_are_equal() -> None:
    example = Example("Is 2 + 2 4?", ("Yes", "5"))
    same = [
        replace(example, completions=(" yes", "5")),
        Example((Message("user", "IS 2  + 2 4?"),), ("Yes", "5")),
    ]
    assert set(find([example, *same], "near_duplicates").rows) == {0, 1, 2}
    others = [replace(example, prompt="Is 2 - 2 4?"), replace(example, completions=("Yes", "-5"))]
    assert find([example, *others], "near_duplicates") is None


def test_near_duplicates_across_the_split() -> None:
    example = Example("2 + 2?", ("4", "5"), split="train")
    same = replace(example, completions=("4 ", "5"))
    assert "across" not in find([example, same], "near_duplicates").sentence
    sentence = find([example, replace(same, split="test")], "near_duplicates").sentence
    assert "1 of them across the split" in sentence


def test_prompts_on_both_sides_of_the_split() -> None:
    train, test = ([replace(example, split=split) for example in PAIRS[:9]] for split in ("train", "test"))
    finding = find([*train[:6], *test[5:]], "split_overlap")
    assert is_problem(finding) and finding.rows == (6,) and finding.numbers == {"rows": 1, "share": 0.25}
    assert find([*train[:5], *test[5:]], "split_overlap") is None
    assert find([*train, *train, *PAIRS], "split_overlap") is None


def test_ties() -> None:
    assert is_problem(find(PAIRS[:80], "ties", tied=20))
    assert not is_problem(find(PAIRS[:81], "ties", tied=19))
    assert find(PAIRS, "ties") is None
    lists = [
        Example(f"Q{k}", ("a", "b", "c"), ranks=(0.0, 1.0, 1.0) if k < 2 else (0, 1, 2)) for k in range(10)
    ]
    finding = find(lists, "ties")
    assert is_problem(finding) and finding.rows == (0, 1) and finding.numbers["lists"] == 2


def test_cuts() -> None:
    rows = [
        (example, (replace(tokenize(example), is_cut=index < 10),)) for index, example in enumerate(PAIRS)
    ]
    counts = {"shortened_prompts": 6, "truncated_completions": 8}
    finding = pick(find_problems(measure_rows(rows[:100]), counts), "cuts")
    assert is_problem(finding) and finding.rows == (0, 1, 2, 3, 4)
    assert finding.numbers == {"rows": 10, "share": 0.1, **counts}
    assert (
        "10 of 100 rows (10.0%) were too long and lost tokens (6 prompts and 8 completions):"
        in finding.sentence
    )
    assert not pick(find_problems(measure_rows(rows[:101]), counts), "cuts").is_problem
    assert pick(find_problems(measure_rows(rows[10:]), counts), "cuts") is None
    text = Example("", ("A text.",), is_document=True)
    part = replace(tokenize(text), is_cut=True)
    assert pick(find_problems(measure_rows([(text, (part, part))]), {}), "cuts") is None


def test_tokens_with_common_prefixes_once() -> None:
    def measure_ids(prompt: int, *completions: tuple[int, ...]) -> tuple[int, int, int]:
        example = Example("Q", tuple(map(str, completions)), label=None if len(completions) > 1 else True)
        tokenized = TokenizedExample(tuple(range(prompt)), completions, example.label)
        features = measure_rows([(example, (tokenized,))])
        return tuple(features[name][0] for name in ("num_tokens", "num_unique_tokens", "longest"))

    assert measure_ids(3, (1, 2, 3), (1, 2, 4, 5)) == (13, 8, 7)
    assert measure_ids(3, (1, 2), (4, 5)) == (10, 7, 5)
    assert measure_ids(0, (1, 2), (1, 2, 3)) == (5, 3, 3)
    assert measure_ids(2, (1, 2, 3), (9,), (1, 2, 4), (1, 5)) == (17, 8, 5)
    assert measure_ids(2, (1, 2, 3)) == (5, 5, 5)
    finding = find(PAIRS, "prefix_sharing")
    total = sum(2 * len(row.prompt) + sum(map(len, row.completions)) for row in map(tokenize, PAIRS))
    assert not finding.is_problem and finding.numbers["tokens"] == total
    longest = [len(row.prompt) + max(map(len, row.completions)) for row in map(tokenize, PAIRS)]
    assert finding.numbers["padded"] == sum(16 * max(longest[k : k + 8]) for k in range(0, 200, 8))


def test_labels() -> None:
    assert is_problem(find(label_rows(PAIRS[:100], 9), "labels"))
    assert not find(label_rows(PAIRS[:100], 10), "labels").is_problem
    finding = find(label_rows(PAIRS[:100], 91), "labels")
    assert is_problem(finding) and finding.rows == (91, 92, 93, 94, 95)
    assert find(PAIRS, "labels") is None


def test_too_few_rows() -> None:
    finding = find([*PAIRS[:MIN_ROWS], Example("Q", ("a",))], "few_rows")
    assert is_problem(finding) and finding.rows == (MIN_ROWS,)
    assert finding.numbers == {"type": "prompt_completion", "rows": 1}
    assert find(PAIRS[:MIN_ROWS], "few_rows") is None


def test_rows_that_were_left_out() -> None:
    finding = find(PAIRS, "left_out", read=210, refused=4, duplicates=6)
    assert not finding.is_problem
    assert finding.sentence == "Of 210 rows, 4 were refused and 6 left out as duplicates."
    assert find(PAIRS, "left_out", read=200) is None
    single = find(PAIRS, "left_out", read=210, refused=1, duplicates=1)
    assert single.sentence == "Of 210 rows, 1 was refused and 1 left out as a duplicate."


def test_problems_come_first() -> None:
    findings = find_problems(measure([*PAIRS[:99], PAIRS[0]]), {"refused": 1})
    lines = format_findings(findings[::-1]).splitlines()
    assert len(lines) == len(findings) and lines[0].startswith(
        "problem: 1 of 100 rows (1.0%) equal an earlier"
    )
    assert all(line.startswith("note:    ") for line in lines[1:])
    assert all(finding.sentence.endswith(".") for finding in findings)
    assert all(json.loads(json.dumps(finding.numbers)) == finding.numbers for finding in findings)


def test_no_rows() -> None:
    assert find_problems(measure([]), {}) == []


def test_every_dataset_type_is_measured() -> None:
    document = Example("", ("A long text.",), is_document=True)
    examples: list[tuple[Example, tuple[TokenizedExample, ...]]] = [
        (example, (tokenize(example),))
        for example in [*PAIRS[:2], Example("Q", ("a", "b", "c"), split="test"), *label_rows(PAIRS, 1)[:2]]
    ]
    examples += [(Example("Q", ("a",)), (tokenize(Example("Q", ("a",))),))]
    parts = tuple(TokenizedExample((), (ids,), is_document=True) for ids in ((1, 2, 3), (4, 5)))
    features = measure_rows([*examples, (document, parts)])
    assert features["dataset_type"].tolist() == [0, 0, 1, 2, 2, 3, 4]
    assert features["split"].tolist() == [0, 0, 2, 0, 0, 0, 0]
    assert features["label"].tolist() == [-1, -1, -1, 1, 0, -1, -1]
    assert features["num_completions"].tolist() == [2, 2, 3, 1, 1, 1, 1]
    lengths = [features[name][-1] for name in ("prompt_length", "chosen_length", "longest", "num_tokens")]
    assert lengths == [0, 5, 3, 5]
    assert features["rejected_length"].tolist()[2:] == [2, 0, 0, 0, 0]
    assert sum(values[0].nbytes for values in features.values()) < 160


def test_a_row_is_measured_alone() -> None:
    whole = measure(PAIRS)
    parts: list[dict[str, Any]] = [measure(PAIRS[:3]), measure(PAIRS[3:])]
    for name, values in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)
        assert values.dtype == parts[0][name].dtype and values.flags.c_contiguous
