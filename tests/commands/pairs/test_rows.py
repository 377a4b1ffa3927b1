"""Which answers meet in a row, by hand, and that `data` reads the row without any option."""

import json

import pytest

from dpo_wrapper.commands.pairs.rows import (
    EMPTY,
    EQUAL,
    TIED,
    Sample,
    drop_repeated,
    make_judged_row,
    make_recorded_row,
)
from dpo_wrapper.data import read_examples
from dpo_wrapper.data.examples import Example
from dpo_wrapper.data.rows.messages import Message

ASK = Message("user", "2 + 2?")
SHARED = {"model": "m"}
PLAIN = Example("2 + 2?", ("4",), source="logs.jsonl, line 3")
DIALOGUE = Example((Message("system", "Add."), ASK), ("4",), source="logs.jsonl, line 3")


def sample(text, seed=1, is_cut=False):
    return Sample(text, seed, is_cut)


def read_back(tmp_path, row):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(row) + "\n")
    [example] = read_examples(file, kind="auto").examples
    return example


def test_the_recorded_answer_is_chosen_and_the_sample_rejected():
    assert make_recorded_row(PLAIN, sample("5", is_cut=True), SHARED) == {
        "prompt": "2 + 2?",
        "chosen": "4",
        "rejected": "5",
        "provenance": {
            "source": "logs.jsonl, line 3",
            "model": "m",
            "completions": [{"from": "log"}, {"from": "sample", "seed": 1, "is_cut": True}],
        },
    }


def test_messages_stay_messages(tmp_path):
    row = make_recorded_row(DIALOGUE, sample("5"), SHARED)
    assert row["prompt"] == [{"role": "system", "content": "Add."}, {"role": "user", "content": "2 + 2?"}]
    assert row["chosen"] == [{"role": "assistant", "content": "4"}]
    assert row["rejected"] == [{"role": "assistant", "content": "5"}]
    example = read_back(tmp_path, row)
    assert (example.prompt, example.completions) == (DIALOGUE.prompt, ("4", "5"))


def test_tools_calls_split_and_weight_are_kept(tmp_path):
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
    recorded = (Message("assistant", None, {"tool_calls": calls}),)
    example = Example((ASK,), (recorded,), split="test", weight=0.5, tools=(tool,))
    given = read_back(tmp_path, make_recorded_row(example, sample("4"), SHARED))
    assert (given.tools, given.split, given.weight) == ((tool,), "test", 0.5)
    assert given.completions == (recorded, "4")


def test_an_answer_that_goes_on_from_a_prefilled_turn_comes_back(tmp_path):
    example = Example((ASK, Message("assistant", "It is")), (" 4",))
    given = read_back(tmp_path, make_recorded_row(example, sample(" 5"), SHARED))
    assert (given.prompt, given.completions) == (example.prompt, (" 4", " 5"))


def test_a_sample_that_equals_the_recorded_answer_or_is_empty_gives_no_pair():
    assert make_recorded_row(PLAIN, sample(" 4\n"), SHARED) == EQUAL
    assert make_recorded_row(PLAIN, sample(" \n"), SHARED) == EMPTY
    assert make_recorded_row(PLAIN, sample(""), SHARED, allow_empty=True)["rejected"] == ""


def test_the_best_sample_is_chosen_over_the_worst():
    samples = [sample("a", 1), sample("b", 2), sample("c", 3), sample("d", 4)]
    row = make_judged_row(PLAIN, samples, [0.5, 2.0, -1.0, 2.0], SHARED)
    assert (row["chosen"], row["rejected"]) == ("b", "c")  # of two best ones the first
    assert row["provenance"]["completions"] == [
        {"from": "sample", "seed": 2, "is_cut": False, "score": 2.0},
        {"from": "sample", "seed": 3, "is_cut": False, "score": -1.0},
    ]


@pytest.mark.parametrize("example", (PLAIN, DIALOGUE), ids=("plain", "dialogue"))
def test_all_samples_are_a_ranked_list_in_which_some_may_be_tied(tmp_path, example):
    samples = [sample("a", 1), sample("b", 2), sample("c", 3)]
    row = make_judged_row(example, samples, [0.5, 2.0, 0.5], SHARED, "list")
    assert row["scores"] == [2.0, 0.5, 0.5]
    given = read_back(tmp_path, row)
    assert given.prompt == example.prompt
    assert (given.completions, given.ranks) == (("b", "a", "c"), (-2.0, -0.5, -0.5))
    assert given.dataset_type == "ranked"


def test_samples_that_are_all_tied_give_no_pair():
    assert make_judged_row(PLAIN, [sample("a"), sample("b")], [1.0, 1.0], SHARED) == TIED
    assert make_judged_row(PLAIN, [sample("a")], [1.0], SHARED) == TIED
    assert make_judged_row(PLAIN, [], [], SHARED) == EMPTY


def test_repeated_and_empty_samples_are_not_compared():
    samples = [sample("a", 1), sample("", 2), sample("a", 3), sample("b", 4)]
    assert drop_repeated(samples) == [samples[0], samples[3]]
    assert drop_repeated(samples, allow_empty=True) == [samples[0], samples[1], samples[3]]
