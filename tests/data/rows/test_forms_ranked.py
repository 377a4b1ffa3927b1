"""Rows with several completions and something that ranks them, two responses and a choice, and labels."""

from typing import Any

import pytest

from dpo_wrapper.data import Example, Fields, convert_examples, to_example
from dpo_wrapper.data.rows.row import Row

ASK = [{"role": "user", "content": "Snow?"}]
TEXTS = ["Blue.", "White.", "Grey."]


def bot(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def dialogue(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]


def read(row: dict[str, Any], **columns: str) -> tuple[Example, list[str]]:
    fields = Fields(**columns)
    given = Row(row, fields.renamed)
    return to_example(given, fields), given.unused()


RANKED: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {  # the row, the best first, not used
    "best first": ({"prompt": "Snow?", "completions": ["White.", "Grey.", "Blue."]}, ["White.", "Grey.",
     "Blue."], []),
    "scores": ({"prompt": "Snow?", "completions": TEXTS, "scores": [1, 9, 5]}, ["White.", "Grey.", "Blue."],
     []),
    "ratings as text": ({"prompt": "Snow?", "responses": TEXTS, "ratings": ["1", "9.5", "5"]},
                        ["White.", "Grey.", "Blue."], []),
    "a JSON list": ({"prompt": "Snow?", "completions": TEXTS, "scores": "[1, 9, 5]"}, ["White.", "Grey.",
     "Blue."], []),
    "ranks": ({"prompt": "Snow?", "completions": TEXTS, "rank": [3, 1, 2]}, ["White.", "Grey.", "Blue."], []),
    "ranks from 0": ({"prompt": "Snow?", "completions": TEXTS, "ranks": [2, 0, 1]}, ["White.", "Grey.",
     "Blue."], []),
    "negative scores": ({"prompt": "Snow?", "completions": TEXTS, "rewards": [-5.5, -0.5, -2]},
                        ["White.", "Grey.", "Blue."], []),
    "one score for the row": ({"prompt": "Snow?", "completions": ["White.", "Blue."], "score": 7},
                              ["White.", "Blue."], ["score"]),
    "NeMo": ({"context": ASK, "completions": [{"rank": 1, "completion": bot("Blue.")},
                                              {"rank": 0, "completion": bot("White.")}]}, ["White.",
                                               "Blue."], []),
    "UltraFeedback": (
        {"source": "s", "instruction": "Snow?", "models": ["m", "n"],
         "completions": [{"model": "m", "response": "Blue.", "overall_score": 2.5, "fine-grained_score": 4.0},
                         {"model": "n", "response": "White.", "overall_score": 8.0,
                          "fine-grained_score": 1.0}]},
        ["White.", "Blue."], ["source", "models"]),
    "distilabel": ({"instruction": "Snow?", "generations": ["Blue.", "White."], "ratings": [1, 5]},
                   ["White.", "Blue."], []),
    "answers with a rank": ({"prompt": "Snow?", "answers": [{"answer": "Blue.", "model": "m", "rank": 7.0},
                                                            {"answer": "White.", "model": "n", "rank": 1.0}]},
                            ["White.", "Blue."], []),
    "dialogues with scores": (
        {"completions": [{"messages": dialogue("Snow?", "Blue."), "score": 1},
                         {"messages": dialogue("Snow?", "White."), "score": 2}]}, ["White.", "Blue."], []),
    "messages": ({"prompt": ASK, "completions": [bot("Blue."), bot("White.")], "scores": [0, 1]},
                 ["White.", "Blue."], []),
    "HelpSteer3, the first": (
        {"domain": "code", "context": ASK, "response1": "White.", "response2": "Blue.",
         "overall_preference": -3},
        ["White.", "Blue."], ["domain"]),
    "HelpSteer3, the second": (
        {"context": ASK, "response1": "Blue.", "response2": "White.", "overall_preference": 1}, ["White.",
         "Blue."], []),
    "arena": (
        {"model_a": "m", "model_b": "n", "winner": "model_b", "conversation_a": dialogue("Snow?", "Blue."),
         "conversation_b": dialogue("Snow?", "White."), "turn": 1}, ["White.", "Blue."], ["model_a",
          "model_b", "turn"]),
    "arena with lists": (
        {"prompt": '["Snow?"]', "response_a": '["White."]', "response_b": '["Blue."]', "winner_model_a": 1,
         "winner_model_b": 0}, ["White.", "Blue."], []),
    "PKU-SafeRLHF": (
        {"prompt": "Snow?", "response_0": "Blue.", "response_1": "White.", "better_response_id": 1,
         "safer_response_id": 0}, ["White.", "Blue."], ["safer_response_id"]),
    "a preference": ({"prompt": "Snow?", "response_a": "Blue.", "response_b": "White.", "preference": "B"},
                     ["White.", "Blue."], []),
    "the name of the column": (
        {"prompt": "Snow?", "answer_a": "White.", "answer_b": "Blue.", "choice": "answer_a"}, ["White.",
         "Blue."], []),
    "numbers from 1": ({"prompt": "Snow?", "response_1": "Blue.", "response_2": "White.", "label": "2"},
                       ["White.", "Blue."], []),
}  # fmt: skip


@pytest.mark.parametrize("name", RANKED)
def test_order(name: str) -> None:
    row, completions, unused = RANKED[name]
    example, left = read(row)
    assert list(example.completions) == completions and left == unused
    prompt = example.prompt if isinstance(example.prompt, str) else example.prompt[0].text
    assert prompt == "Snow?"


def test_a_choice_between_dialogues_of_several_turns() -> None:
    row = {
        "prompt": '["Snow?", "Sure?"]',
        "response_a": '["Blue.", "No."]',
        "response_b": '["White.", "Yes."]',
        "winner_model_a": 0,
        "winner_model_b": 1,
    }
    example, _ = read(row)
    first, second = ([turn.text for turn in turns] for turns in example.completions)  # type: ignore
    assert first == ["White.", "Sure?", "Yes."] and second == ["Blue.", "Sure?", "No."]


def test_equal_ranks_make_no_pair() -> None:
    example, _ = read({"prompt": "Q", "completions": ["a", "b", "c", "d"], "scores": [1, 3, 1, 2]})
    pairs, _ = convert_examples([example], "preference")
    assert [pair.completions for pair in pairs] == [
        ("b", "d"),
        ("b", "a"),
        ("b", "c"),
        ("d", "a"),
        ("d", "c"),
    ]
    (listed,), _ = convert_examples([example], "ranked")
    assert listed.completions == ("b", "d", "a")
    best, _ = convert_examples([example], "preference", "best")
    assert [pair.completions for pair in best] == [("b", "d"), ("b", "a"), ("b", "c")]


SNOW = dialogue("Snow?", "White.")
LABELLED: dict[str, tuple[dict[str, Any], bool, list[str]]] = {
    "true": ({"prompt": "Snow?", "completion": "White.", "label": True}, True, []),
    "1": ({"prompt": "Snow?", "completion": "White.", "label": 1}, True, []),
    "0.0": ({"prompt": "Snow?", "completion": "White.", "label": 0.0}, False, []),
    "'False'": ({"prompt": "Snow?", "completion": "White.", "label": "False"}, False, []),
    "'1'": ({"prompt": "Snow?", "completion": "White.", "label": " 1 "}, True, []),
    "'yes'": ({"prompt": "Snow?", "completion": "White.", "label": "yes"}, True, []),
    "messages": ({"messages": SNOW, "label": False}, False, []),
    "messages beside": ({"prompt": ASK, "completion": bot("White."), "label": "true"}, True, []),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "Snow?"}, {"from": "gpt", "value": "White."}],
                  "kto_tag": True}, True, []),
    "alpaca": ({"instruction": "Snow?", "input": "", "output": "White.", "kto_tag": False}, False, []),
    "response": ({"query": "Snow?", "response": "White.", "label": 1, "source": "s"}, True, ["source"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LABELLED)
def test_label(name: str) -> None:
    row, label, unused = LABELLED[name]
    example, left = read(row)
    assert (example.label, example.completions, left) == (label, ("White.",), unused)
    assert example.prompt == "Snow?" or example.prompt[0].text == "Snow?"  # type: ignore[union-attr]
    assert example.form == "labelled completion"


def test_labels_of_a_dialogue_are_about_its_last_answer() -> None:
    example, _ = read({"messages": dialogue("Snow?", "White.", "Coal?", "Black."), "label": True})
    assert example.completions == ("Black.",) and len(example.prompt) == 3
    example, _ = read({"prompt": "Snow?", "out": "White.", "good": 0}, completion="out", label="good")
    assert example == Example("Snow?", ("White.",), False)


def test_forms_are_named() -> None:
    names = {name: read(row)[0].form for name, (row, _, _) in RANKED.items()}
    assert names["best first"] == "ranked list" and names["NeMo"] == "ranked list (by completions.rank)"
    assert names["scores"] == "ranked list (by scores)" and names["arena"] == "two responses and a choice"
