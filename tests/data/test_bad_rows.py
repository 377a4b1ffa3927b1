"""Every way to get a row wrong: place, field, what came and the remedy are in the message."""

import pickle
from typing import Any

import pytest

from dpo_wrapper.data import Fields, Message, RowError, normalize

USER, ANSWER, OTHER = ({"role": role, "content": role} for role in ("user", "assistant", "assistant"))
SYSTEM = {"role": "system", "content": "S"}
QUESTION = {"role": "user", "content": "R"}
HUMAN, GPT = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}
ASKED = "Human: Q\n\nAssistant: "

MISSING = "add it, or say which field holds this side"
LEAVE = "leave the row out"
ONE_FORM = "write both sides in one form"


def row(*absent: str, **changes: Any) -> dict[str, Any]:
    record = {"prompt": "Q", "chosen": "A", "rejected": "B", **changes}
    return {key: value for key, value in record.items() if key not in absent}


def turns(prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


BAD: dict[str, list[tuple[Any, str, str]]] = {  # field: record, what was expected and came, remedy
    "": [
        ([1, 2], "an object with the two sides of a pair, got a list of 2", "write one object per row"),
        ("text", "got 'text'", "write one object per row"),
        ("x" * 41, "got a string of 41 characters", "write one object per row"),
        (None, "got null", "write one object per row"),
    ],
    "field 'chosen'": [
        ({}, "got a record with no fields", MISSING),
        (row("chosen"), "got a record with 'prompt', 'rejected'", MISSING),
        (row(chosen=None), "expected text or a list of messages, got null", f"fill it in or {LEAVE}"),
        (row(chosen=True), "got true", LEAVE),
        (row(chosen=b"A"), "got a value of type bytes", LEAVE),
        (row(chosen="A\ud83d"), "got \\ud83d at character 2, half of a surrogate pair", "remove or replace"),
        (
            turns([USER], [USER], [OTHER]),
            "a dialogue that ends in an assistant turn, got a user turn at its end",
            "add the answer",
        ),
        (turns([USER], [], [OTHER]), "at least one message, got an empty list", "add the messages"),
        (row("prompt", chosen=[ANSWER], rejected=[OTHER]), "got the answer alone", "add the prompt"),
        (
            turns("Q", [QUESTION, ANSWER], [USER, OTHER]),
            "the answer to field 'prompt' or a dialogue that begins with it, got a dialogue",
            "correct one of the two",
        ),
        (
            turns([{"role": "system", "content": "T"}, USER], [SYSTEM, USER, ANSWER], [SYSTEM, USER, OTHER]),
            "got a dialogue that begins otherwise",
            "correct one of the two",
        ),
        (
            turns("Z", f"{ASKED}A", f"{ASKED}B"),
            "got a dialogue that begins otherwise",
            "correct one of the two",
        ),
        (
            row("prompt", chosen=f"{ASKED}A\n\nHuman: R", rejected=f"{ASKED}B"),
            "got a user turn at its end",
            "add the answer",
        ),
        (
            row("prompt", chosen="A", rejected=f"{ASKED}B"),
            "turns as in field 'rejected', got text without turns",
            f"{ONE_FORM} or add a prompt",
        ),
        (
            row("prompt", chosen=[USER, ANSWER, ANSWER], rejected=[USER, ANSWER, OTHER]),
            "a prompt that ends in a turn which is not the assistant's, got an assistant turn at its end",
            "leave the answers to the two sides",
        ),
    ],
    "field 'rejected'": [
        (row("rejected"), "got a record with 'prompt', 'chosen'", MISSING),
        (row(rejected=3), "got the number 3", LEAVE),
        (turns([USER], [ANSWER], "B"), "expected messages as in field 'chosen', got a string", ONE_FORM),
        (turns([USER], "A", OTHER), "expected a string as in field 'chosen', got messages", ONE_FORM),
        (
            row("prompt", chosen=[USER, ANSWER], rejected=[SYSTEM, USER, OTHER]),
            "got other ones from turn 1 on (turns: 2, there: 1)",
            "let both sides answer one prompt",
        ),
        (
            row("prompt", chosen=[USER, ANSWER, QUESTION, ANSWER], rejected=[USER, OTHER]),
            "got other ones from turn 2 on (turns: 1, there: 3)",
            "let both sides answer one prompt",
        ),
        (
            row("prompt", chosen=f"{ASKED}A", rejected="Human: R\n\nAssistant: B"),
            "the same turns before the last answer as in field 'chosen', got other ones from turn 1 on",
            LEAVE,
        ),
        (
            row("prompt", chosen=f"{ASKED}A", rejected="B"),
            "a dialogue with '\\n\\nAssistant:' turns as in field 'chosen', got text without turns",
            f"{ONE_FORM} or add a prompt",
        ),
    ],
    "field 'prompt'": [
        (
            row("prompt"),
            "expected this field, got a record with 'chosen', 'rejected'",
            "add 'prompt' or say which field holds the prompt",
        ),
        (row(prompt=None), "expected a prompt that is not empty, got null", f"fill it in or {LEAVE}"),
        (row(prompt=""), "got an empty string", "fill it in"),
        (row(prompt=[]), "got an empty list", "fill it in"),
        (row(prompt=7), "expected text or a list of messages, got the number 7", "write the prompt as text"),
        (turns([USER, ANSWER], "A", "B"), "got an assistant turn at its end", "leave the answers to the two"),
        (row(prompt=f"{ASKED}A\n\nAssistant:"), "got an assistant turn at its end", "leave the answers"),
    ],
    "field 'prompt', message 1": [
        (row(prompt=["Q"]), "'content' (or 'from' and 'value'), got 'Q'", "write every message as such"),
        (row(prompt=[{"content": "Q"}]), "got an object with 'content' and no role", "add the role"),
        (
            row(prompt=[{"role": "narrator", "content": "Q"}]),
            "a role out of system, user, assistant, tool, got 'narrator'",
            "rename the role",
        ),
        (row(prompt=[{"role": 1, "content": "Q"}]), "got the number 1", "rename the role"),
        (
            row(prompt=[{"role": "user", "content": [{"type": "text"}]}]),
            "content that is one string, got a list of 1",
            "write it as plain text",
        ),
        (
            row(prompt=[{"role": "user", "content": "\udc00"}]),
            "got \\udc00 at character 1",
            "remove or replace",
        ),
    ],
    "field 'prompt', message 2": [
        (row(prompt=[USER, {"role": "user"}]), "got a message without content", "add the text"),
        (row(prompt=[USER, None]), "got null", "write every message as such an object"),
    ],
    "field 'chosen', message 1": [
        (
            {"conversations": [HUMAN], "chosen": {"from": "gpt"}, "rejected": GPT},
            "without content",
            "add the text",
        ),
    ],
    "field 'text'": [
        (row("prompt", text=" "), "expected a prompt that is not empty, got ' '", "fill it in"),
    ],
    "field 'split'": [
        (row(split="later"), "expected 'train' or 'test', got 'later'", "rename it or leave the field out"),
        (row(split=1), "got the number 1", "rename it"),
    ],
}
CASES = [(field, *case) for field, cases in BAD.items() for case in cases]


@pytest.mark.parametrize(("field", "record", "came", "remedy"), CASES)
def test_bad_row(field: str, record: Any, came: str, remedy: str) -> None:
    with pytest.raises(RowError) as caught:
        normalize(record, Fields(), "prefs.jsonl, line 12")
    message = str(caught.value)
    assert message.startswith("prefs.jsonl, line 12" + (f", {field}" if field else "") + ": expected ")
    assert came in message.partition("; ")[0]
    assert remedy in message.partition("; ")[2]
    assert "\n" not in message and len(message) < 300


def test_a_named_field_that_is_absent_names_those_that_are_there() -> None:
    with pytest.raises(RowError) as caught:
        normalize({"prompt": "Q", "chosen": "A", "rejected": "B"}, Fields(prompt="question"), "a.json, row 3")
    assert str(caught.value) == (
        "a.json, row 3, field 'question': expected this field, got a record with 'prompt', 'chosen', "
        "'rejected'; say which field holds the prompt"
    )


def test_an_error_without_a_place_and_through_a_pickle() -> None:
    with pytest.raises(RowError) as caught:
        normalize({}, Fields())
    assert str(caught.value).startswith("field 'chosen': expected")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    "names", [{"chosen": "rejected"}, {"prompt": ""}, {"split": 3}, {"prompt": "chosen"}]
)
def test_field_names_that_cannot_be(names: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"expected different, non-empty field names, got .*; name each column once"
    ):
        Fields(**names)


def test_message_role() -> None:
    with pytest.raises(
        ValueError, match="expected a role out of system, user, assistant, tool, got 'human'; rename"
    ):
        Message("human", "Q")
