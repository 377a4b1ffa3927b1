"""Every way to get a row wrong: place, field, what came and the remedy are in the message."""

import pickle
from typing import Any

import pytest

from dpo_wrapper.data import ExampleError, Fields, Message, to_example

USER, ANSWER, OTHER = ({"role": role, "content": role} for role in ("user", "assistant", "assistant"))
SYSTEM = {"role": "system", "content": "S"}
QUESTION = {"role": "user", "content": "R"}
HUMAN, GPT = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}
ASKED = "Human: Q\n\nAssistant: "

MISSING = "add it, name its column by --columns, or give 'completions', or 'completion' and 'label'"
LEAVE = "leave the row out"
ONE_FORM = "write all completions in one form"


def row(*absent: str, **changes: Any) -> dict[str, Any]:
    record = {"prompt": "Q", "chosen": "A", "rejected": "B", **changes}
    return {key: value for key, value in record.items() if key not in absent}


def turns(prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


BAD: dict[str, list[tuple[Any, str, str]]] = {  # field: record, what should be and is, remedy
    "": [
        (
            [1, 2],
            "a row should be an object with prompt and completions, but it is a list of 2",
            "write one object per row",
        ),
        ("text", "but it is 'text'", "write one object per row"),
        ("x" * 41, "but it is a string of 41 characters", "write one object per row"),
        (None, "but it is null", "write one object per row"),
    ],
    "field 'chosen'": [
        ({}, "a row should have this field, but it has no fields", MISSING),
        (row("chosen"), "a row should have this field, but it has 'prompt', 'rejected'", MISSING),
        (
            row(chosen=None),
            "the value should be text or a list of messages, but it is null",
            f"one of these forms or {LEAVE}",
        ),
        (row(chosen=True), "but it is true", LEAVE),
        (row(chosen=b"A"), "but it is a value of type bytes", LEAVE),
        (
            row(chosen="A\ud83d"),
            "should be Unicode, but character 2 is \\ud83d, half of a surrogate pair",
            "remove or replace",
        ),
        (
            turns([USER], [USER], [OTHER]),
            "the dialogue should end in an assistant turn, but it ends in a user turn",
            "add the answer",
        ),
        (
            turns([USER], [], [OTHER]),
            "there should be at least one message, but the list is empty",
            "add some",
        ),
        (
            row("prompt", chosen=[ANSWER], rejected=[OTHER]),
            "a prompt should come first, but none does",
            f"add it or {LEAVE}",
        ),
        (
            turns("Q", [QUESTION, ANSWER], [USER, OTHER]),
            "the dialogue should answer or repeat field 'prompt', but it begins otherwise",
            "correct one of the two",
        ),
        (
            turns([{"role": "system", "content": "T"}, USER], [SYSTEM, USER, ANSWER], [SYSTEM, USER, OTHER]),
            "but it begins otherwise",
            "correct one of the two",
        ),
        (
            turns("Z", f"{ASKED}A", f"{ASKED}B"),
            "but it begins otherwise",
            "correct one of the two",
        ),
        (
            row("prompt", chosen=f"{ASKED}A\n\nHuman: R", rejected=f"{ASKED}B"),
            "but it ends in a user turn",
            "add the answer",
        ),
        (
            row("prompt", chosen="A", rejected=f"{ASKED}B"),
            "turns as in field 'rejected', but it is text without turns",
            f"{ONE_FORM} or add a prompt",
        ),
        (
            row("prompt", chosen=[USER, ANSWER, ANSWER], rejected=[USER, ANSWER, OTHER]),
            "the last turn of the prompt should not be the assistant's, but it is an assistant turn",
            "leave the answers to the completions",
        ),
    ],
    "field 'rejected'": [
        (row("rejected"), "a row should have this field, but it has 'prompt', 'chosen'", MISSING),
        (row(rejected=3), "but it is the number 3", LEAVE),
        (
            turns([USER], [ANSWER], "B"),
            "the completion should be messages as in field 'chosen', but it is a string",
            ONE_FORM,
        ),
        (
            turns([USER], "A", OTHER),
            "the completion should be a string as in field 'chosen', but it is messages",
            ONE_FORM,
        ),
        (
            row("prompt", chosen=[USER, ANSWER], rejected=[SYSTEM, USER, OTHER]),
            "but they differ from turn 1 on (2 turns instead of 1)",
            "let all answer one prompt",
        ),
        (
            row("prompt", chosen=f"{ASKED}A", rejected="Human: R\n\nAssistant: B"),
            "turns before the last answer should be those of field 'chosen', but they differ from turn 1 on",
            LEAVE,
        ),
        (
            row("prompt", chosen=f"{ASKED}A", rejected="B"),
            "a dialogue with '\\n\\nAssistant:' turns as in field 'chosen', but it is text without turns",
            f"{ONE_FORM} or add a prompt",
        ),
    ],
    "field 'prompt'": [
        (
            {"completion": "A", "label": True},
            "a row should have this field, but it has 'completion', 'label'",
            "add 'prompt', name its column by --columns",
        ),
        (
            row("prompt"),
            "a row should have this field, but it has 'chosen', 'rejected'",
            "or say that there is none by --columns prompt=.",
        ),
        (row(prompt=None), "the prompt should not be empty, but it is null", f"fill it in or {LEAVE}"),
        (row(prompt=""), "but it is an empty string", "fill it in"),
        (row(prompt=[]), "but it is an empty list", "fill it in"),
        (
            row(prompt=7),
            "text or a list of messages, but it is the number 7",
            "write it in one of these forms",
        ),
        (row(prompt=f"{ASKED}A\n\nAssistant:"), "but it is an assistant turn", "leave the answers"),
    ],
    "field 'prompt', message 1": [
        (
            row(prompt=["Q"]),
            "'content' (or 'from' and 'value'), but it is 'Q'",
            "write every message as such",
        ),
        (row(prompt=[{"content": "Q"}]), "but it is an object with 'content' without a role", "add the role"),
        (
            row(prompt=[{"role": "narrator", "content": "Q"}]),
            "the role should be one of system, developer, user, assistant, tool, but it is 'narrator'",
            "rename the role",
        ),
        (row(prompt=[{"role": 1, "content": "Q"}]), "but it is the number 1", "rename the role"),
        (
            row(prompt=[{"role": "user", "content": [{"type": "text"}]}]),
            "but it holds a part of type 'text', which is not read as text",
            "write the content as plain text",
        ),
        (
            row(prompt=[{"role": "user", "content": "\udc00"}]),
            "character 1 is \\udc00",
            "remove or replace",
        ),
    ],
    "field 'prompt', message 2": [
        (row(prompt=[USER, {"role": "user"}]), "but it has no content", "add the text"),
        (row(prompt=[USER, None]), "but it is null", "write every message as such an object"),
    ],
    "field 'chosen', message 1": [
        (
            {"conversations": [HUMAN], "chosen": {"from": "gpt"}, "rejected": GPT},
            "has no content",
            "add the text",
        ),
    ],
    "field 'text'": [
        (row("prompt", text=" "), "the prompt should not be empty, but it is ' '", "fill it in"),
    ],
    "field 'label'": [
        (
            {"prompt": "Q", "completion": "A", "label": 2},
            "true or false, but it is the number 2",
            "say whether",
        ),
    ],
    "field 'completion'": [
        (
            {"prompt": "Q", "completion": 3, "label": True},
            "text or a list of messages, but it is the number",
            LEAVE,
        ),
    ],
    "field 'completions'": [
        (
            {"prompt": "Q", "completions": ["A"]},
            "the completions should be a ranked list, but they are a list of 1",
            "at least two",
        ),
        (
            {"prompt": "Q", "completions": "AB"},
            "the completions should be a ranked list, but they are 'AB'",
            "at least",
        ),
    ],
    "field 'completions[1]'": [
        (
            {"completions": [f"{ASKED}A", "Human: R\n\nAssistant: B", f"{ASKED}C"]},
            "those of field 'completions[0]', but they differ from turn 1 on",
            "let all answer one prompt",
        ),
        ({"prompt": "Q", "completions": ["A", [OTHER]]}, "a string as in field 'completions[0]'", ONE_FORM),
    ],
    "field 'split'": [
        (
            row(split="later"),
            "the split should be 'train' or 'test', but it is 'later'",
            "rename it, leave the field out",
        ),
        (row(split=1), "but it is the number 1", "rename it"),
    ],
}
CASES = [(field, *case) for field, cases in BAD.items() for case in cases]


@pytest.mark.parametrize(("field", "record", "received", "remedy"), CASES)
def test_bad_row(field: str, record: Any, received: str, remedy: str) -> None:
    with pytest.raises(ExampleError) as caught:
        to_example(record, Fields(), "prefs.jsonl, line 12")
    message = str(caught.value)
    problem, _, end = message.rpartition(": ")
    assert problem.startswith("prefs.jsonl, line 12" + (f", {field}" if field else "") + ": ")
    assert " should " in problem and ", but " in problem and received in problem
    assert remedy in end and end.endswith(".")
    assert "\n" not in message and len(message) < 300


def test_a_named_field_that_is_absent_names_those_that_are_there() -> None:
    with pytest.raises(ExampleError) as caught:
        to_example(
            {"prompt": "Q", "chosen": "A", "rejected": "B"}, Fields(prompt="question"), "a.json, row 3"
        )
    assert str(caught.value) == (
        "a.json, row 3, field 'question': a row should have this field, but it has 'prompt', 'chosen', "
        "'rejected': name its column by --columns."
    )


def test_an_error_without_a_place_and_through_a_pickle() -> None:
    with pytest.raises(ExampleError) as caught:
        to_example({}, Fields())
    assert str(caught.value).startswith(
        "field 'chosen': a row should have this field, but it has no fields: add it"
    )
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    "names", [{"chosen": "rejected"}, {"chosen": ""}, {"split": 3}, {"prompt": "chosen"}]
)
def test_field_names_that_cannot_be(names: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError,
        match=r"field names should be different and those of the texts not empty, .*: name each column once",
    ):
        Fields(**names)


def test_message_role() -> None:
    with pytest.raises(
        ValueError,
        match="the role should be one of system, developer, user, assistant, tool, but it is 'human': rename",
    ):
        Message("human", "Q")


def test_columns_that_differ_in_case_are_named() -> None:
    remedy = r": name its fields with --columns prompt=Prompt chosen=CHOSEN rejected=Rejected, or leave"
    with pytest.raises(ExampleError, match=remedy):
        to_example({"Prompt": "Q", "CHOSEN": "A", "Rejected": "B"}, Fields(), kind="auto")
    with pytest.raises(ExampleError, match=r": add it, name its column by --columns, or give"):
        to_example({"prompt": "Q", "chosen": "A", "Text": "B"}, Fields())


def test_numbers_of_turns_are_told_where_they_differ() -> None:
    sides = {"chosen": f"{ASKED}A", "rejected": "Human: R\n\nAssistant: B"}
    with pytest.raises(ExampleError, match="they differ from turn 1 on: let all answer one prompt"):
        to_example(sides, Fields())
    with pytest.raises(ExampleError, match=r"from turn 1 on \(1 turn instead of 3\): let all"):
        to_example(sides | {"chosen": f"{ASKED}A\n\nHuman: Q\n\nAssistant: A"}, Fields())
