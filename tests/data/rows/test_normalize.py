"""Every form of a record becomes the same example."""

from itertools import groupby
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_wrapper.data import Example, ExampleError, Fields, Message, to_example
from dpo_wrapper.data.rows.row import Row

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
HUMAN, GPT = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}
SYSTEM = {"role": "system", "content": "S"}
OTHER = {"role": "assistant", "content": "B"}
TURNS = (Message("user", "Q"),)
SYSTEM_TURNS = (Message("system", "S"), Message("user", "Q"))
LONG = (Message("user", "Q"), Message("assistant", "A"), Message("user", "R"))

FORMS: list[tuple[str, dict[str, Any], Any]] = [
    ("plain", {"prompt": "Q", "chosen": "A", "rejected": "B"}, "Q"),
    ("plain text field", {"text": "Q", "chosen": "A", "rejected": "B", "extra": 3}, "Q"),
    ("first of several fields", {"text": "no", "prompt": "Q", "chosen": "A", "rejected": "B"}, "Q"),
    ("null in another form's column", {"prompt": None, "text": "Q", "chosen": "A", "rejected": "B"}, "Q"),
    (
        "dialogue text",
        {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
        TURNS,
    ),
    (
        "dialogue text without leading blank lines, with system text before",
        {"chosen": "S\n\nHuman: Q\n\nAssistant:A\n", "rejected": " S\n\nHuman:Q \n\nAssistant: B"},
        SYSTEM_TURNS,
    ),
    (
        "dialogue text, empty prompt column",
        {"prompt": "", "chosen": "Human: Q\n\nAssistant: A", "rejected": "Human: Q\n\nAssistant: B"},
        TURNS,
    ),
    (
        "dialogue text as prompt",
        {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " A", "rejected": " B "},
        TURNS,
    ),
    (
        "dialogue text as prompt and again on both sides",
        {
            "prompt": "\n\nHuman: Q\n\nAssistant:",
            "chosen": "\n\nHuman: Q\n\nAssistant: A",
            "rejected": "\n\nHuman: Q\n\nAssistant: B",
        },
        TURNS,
    ),
    (
        "the same with system text before",
        {
            "prompt": "S\n\nHuman: Q\n\nAssistant:",
            "chosen": "S\n\nHuman: Q\n\nAssistant: A",
            "rejected": "S\n\nHuman: Q\n\nAssistant: B",
        },
        SYSTEM_TURNS,
    ),
    (
        "plain prompt, dialogue text on both sides",
        {"prompt": "Q", "chosen": "Human: Q\n\nAssistant: A", "rejected": "Human: Q\n\nAssistant: B"},
        TURNS,
    ),
    ("messages", {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}, TURNS),
    ("one message instead of a list", {"prompt": USER, "chosen": ANSWER, "rejected": OTHER}, TURNS),
    ("messages, prompt implicit", {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, TURNS),
    (
        "messages, prompt repeated",
        {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        TURNS,
    ),
    (
        "messages, system text only in the prompt",
        {"prompt": [SYSTEM, USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        SYSTEM_TURNS,
    ),
    (
        "messages, system text only on the sides",
        {"prompt": [USER], "chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, OTHER]},
        SYSTEM_TURNS,
    ),
    (
        "system text as the prompt",
        {"prompt": [SYSTEM], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        SYSTEM_TURNS,
    ),
    ("string and messages", {"prompt": "Q", "chosen": [ANSWER], "rejected": [OTHER]}, TURNS),
    (
        "string, repeated in messages",
        {"prompt": "Q\n", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        TURNS,
    ),
    (
        "string, a later question of the dialogue",
        {
            "prompt": "R",
            "chosen": [USER, ANSWER, {"role": "user", "content": "R"}, ANSWER],
            "rejected": [USER, ANSWER, {"role": "user", "content": "R"}, OTHER],
        },
        LONG,
    ),
    ("messages and strings", {"prompt": [SYSTEM, USER], "chosen": "A", "rejected": "B"}, SYSTEM_TURNS),
    (
        "ShareGPT",
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "B"}},
        TURNS,
    ),
    (
        "ShareGPT with nulls from Parquet",
        {
            "conversations": [{**HUMAN, "role": None, "content": None}],
            "chosen": [{**GPT, "role": None}],
            "rejected": [{"from": "model", "value": "B", "content": None}],
        },
        TURNS,
    ),
    (
        "the other names of the roles",
        {
            "messages": [
                {"from": "Human", "value": "Q"},
                {"from": "chatgpt", "value": "A"},
                {"role": "user", "content": "R"},
            ],
            "chosen": "A",
            "rejected": "B",
        },
        LONG,
    ),
]


@pytest.mark.parametrize(("record", "prompt"), [case[1:] for case in FORMS], ids=[case[0] for case in FORMS])
def test_form(record: dict[str, Any], prompt: Any) -> None:
    assert to_example(record, Fields(), "f, line 1") == Example(prompt, ("A", "B"), source="f, line 1")


def test_tools_and_their_other_names() -> None:
    for name in ("tool", "function", "observation"):
        turns = [{"from": "human", "value": "Q"}, {"from": name, "value": "42"}]
        example = to_example({"prompt": turns, "chosen": "A", "rejected": "B"}, Fields(), "")
        assert example.prompt == (Message("user", "Q"), Message("tool", "42"))


def test_plain_text_is_kept_to_the_character_and_completions_may_be_empty() -> None:
    example = to_example({"prompt": " Q\r\n", "chosen": "", "rejected": "\u2028 B "}, Fields(), "")
    assert example == Example(" Q\r\n", ("", "\u2028 B "))
    example = to_example(
        {"chosen": "Human: Q\n\nAssistant:", "rejected": "Human: Q\n\nAssistant: B"}, Fields(), ""
    )
    assert example == Example(TURNS, ("", "B"))


def test_configured_names() -> None:
    fields = Fields(prompt="q", chosen="good", rejected="bad", split="part")
    example = to_example({"q": "Q", "good": "A", "bad": "B", "part": "valid", "prompt": "other"}, fields, "")
    assert example == Example("Q", ("A", "B"), split="test")


@pytest.mark.parametrize(
    ("value", "split"),
    [(name, "test") for name in ("test", "validation", "valid", "eval", "held-out", "heldout", "Test ")]
    + [("train", "train"), (None, None)],
)
def test_split(value: str | None, split: str | None) -> None:
    assert (
        to_example({"prompt": "Q", "chosen": "A", "rejected": "B", "split": value}, Fields(), "").split
        == split
    )


@pytest.mark.pitfall(12)
def test_the_completion_is_the_last_assistant_turn_in_every_form() -> None:
    text = "\n\nHuman: Q\n\nAssistant: A\n\nHuman: R\n\nAssistant: {}"
    turns = [USER, ANSWER, {"role": "user", "content": "R"}]
    shares = [HUMAN, GPT, {"from": "human", "value": "R"}]
    for record in (
        {"chosen": text.format("A"), "rejected": text.format("B")},
        {"prompt": "Q", "chosen": text.format("A"), "rejected": text.format("B")},
        {"prompt": text.format("")[:-1], "chosen": " A", "rejected": " B"},
        {"prompt": turns, "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": [USER], "chosen": [*turns, ANSWER], "rejected": [*turns, OTHER]},
        {"chosen": [*turns, ANSWER], "rejected": [*turns, OTHER]},
        {"conversations": shares, "chosen": GPT, "rejected": {"from": "gpt", "value": "B"}},
    ):
        assert to_example(record, Fields(), "") == Example(LONG, ("A", "B"))


_content = st.text(max_size=20).map(str.strip).filter(lambda text: "\n\n" not in text)


@given(
    st.lists(st.tuples(st.sampled_from(["user", "assistant"]), _content), max_size=5),
    _content,
    _content,
    _content,
)
def test_dialogue_text_is_parsed_into_the_turns_it_was_made_of(
    turns: list[tuple[str, str]], question: str, chosen: str, rejected: str
) -> None:
    prompt = tuple(Message(role, content) for role, content in [*turns, ("user", question)])
    names = {"user": "Human", "assistant": "Assistant"}
    text = "".join(f"\n\n{names[turn.role]}: {turn.content}" for turn in prompt) + "\n\nAssistant: "
    # a speaker who goes on has one turn
    spoken = [(role, list(group)) for role, group in groupby(prompt, key=lambda turn: turn.role)]
    prompt = tuple(
        Message(role, "\n\n".join(turn.content for turn in group if turn.content)) for role, group in spoken
    )
    example = to_example({"chosen": text + chosen, "rejected": text + rejected}, Fields(), "")
    assert example == Example(prompt, (chosen, rejected))


_keys = st.sampled_from(
    [
        "role",
        "content",
        "from",
        "value",
        "prompt",
        "chosen",
        "rejected",
        "completions",
        "completion",
        "label",
        "split",
        "weight",
        "margin",
    ]
)
_leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


@given(
    st.recursive(
        _leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=5),
        max_leaves=12,
    )
)
def test_anything_is_an_example_or_an_example_error(record: Any) -> None:
    try:
        example = to_example(record, Fields(), "place")
    except ExampleError as error:
        assert str(error).startswith("place")
    else:
        assert isinstance(example, Example)


def test_a_speaker_who_goes_on_has_one_turn() -> None:
    text = "\n\nHuman: Q\n\nAssistant: A\n\nHuman: R\n\nAssistant:"
    example = to_example({"chosen": f"{text} B\n\nAssistant: C", "rejected": f"{text} D"}, Fields(), "")
    assert example.completions == ("B\n\nC", "D")
    assert [turn.content for turn in example.prompt] == ["Q", "A", "R"]


def test_a_subset_is_read_and_does_not_count_as_used():
    """Evaluation alone uses it."""
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "part": 7}
    fields = Fields(subset="part")
    named = Row(row, fields.renamed)
    assert to_example(named, fields).subset == "7" and named.unused() == ["part"]
    assert to_example(row | {"subset": "chat"}).subset == "chat"
    assert (
        to_example(row | {"subset": " "}).subset is None
        and to_example(row | {"subset": ["x"]}).subset is None
    )
