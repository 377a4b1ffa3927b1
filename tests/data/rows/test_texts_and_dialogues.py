"""Plain texts: without a prompt, as a user's question, and with what only a dialogue may have."""

import pytest

from dpo_wrapper.data import (
    ByteTokenizer,
    Example,
    ExampleError,
    Fields,
    HuggingFaceTokenizer,
    Message,
    Tokenizer,
    split_examples,
    to_example,
    tokenize_examples,
)
from dpo_wrapper.data.config import DataConfig
from helpers.tokenizer_kinds import CHATML, make_tokenizer

pytest.importorskip("jinja2")

TOOLS = ({"type": "function", "function": {"name": "sky"}},)


def with_template() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(make_tokenizer("byte-level", CHATML))


def shown(tokenizer: Tokenizer, example: Example, as_chat: bool | None = None) -> list[str]:
    """The prompt and the completions as text."""
    (tokenized,) = tokenize_examples([example], tokenizer, 64, as_chat=as_chat).examples
    parts = [tokenized.prompt, *tokenized.completions]
    return [tokenizer.decode(ids, skip_special_tokens=False) for ids in parts]


def test_pairs_without_a_prompt() -> None:
    row = {"chosen": "It is noon.", "rejected": "It is"}
    with pytest.raises(ExampleError, match=r"or say that there is none by --columns prompt=\.$"):
        to_example(row)
    example = to_example(row, DataConfig(data="a.jsonl", columns=("prompt=",)).fields)
    assert example == Example("", ("It is noon.", "It is"))
    assert shown(ByteTokenizer(), example) == ["<bos>", "It is noon.<eos>", "It is<eos>"]
    assert shown(with_template(), example) == ["<s>", "It is noon.</s>", "It is</s>"]  # no empty question
    labelled = to_example({"completion": "It is.", "label": 1}, Fields(prompt=""))
    assert labelled == Example("", ("It is.",), True)
    dialogue = {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"}
    assert to_example(dialogue, Fields(prompt="")).prompt == (Message("user", "Q"),)


def test_texts_without_a_prompt_are_split_by_what_they_say() -> None:
    examples = [Example("", (f"text {k}", "no")) for k in range(20)]
    train, test = split_examples([*examples, *examples], 0.2)
    assert len(test) == 8 and not {e.completions for e in train} & {e.completions for e in test}


def test_a_text_is_a_question_where_there_is_a_template() -> None:
    example = Example("What?", ("It is.", "No."))
    opened = "<s>user\nWhat?</s>\n<s>assistant\n"
    assert shown(with_template(), example)[0] == shown(with_template(), example, True)[0] == opened
    assert shown(with_template(), example, False)[0] == "<s>What?"
    assert shown(ByteTokenizer(), example)[0] == "<bos>What?"
    assert shown(ByteTokenizer(), example, True)[0] == "<bos><user>What?<assistant>"
    written = Example(opened, ("It is.", "No."))
    assert shown(with_template(), written) == [opened, "It is.</s>", "No.</s>"]


@pytest.mark.parametrize("as_chat", [None, False])
def test_tools_beside_a_text(as_chat: bool | None) -> None:
    example = Example("What?", ("It is.", "No."), tools=TOOLS, source="a.jsonl, line 3")
    message = (
        "^a.jsonl, line 3: tools should belong to a dialogue, but the prompt is plain text: write it as "
        "messages, or ignore the column with --columns tools=.$"
    )
    with pytest.raises(ExampleError, match=message):
        tokenize_examples([example], ByteTokenizer(), 64, as_chat=as_chat)


def test_what_bytes_cannot_write() -> None:
    question, call = (Message("user", "Q"),), Message("assistant", None, {"tool_calls": [{"name": "f"}]})
    thought = (Message("assistant", "A", {"reasoning_content": "B"}),)
    for example in (
        Example(question, ("A", "B"), tools=TOOLS),
        Example((*question, call, Message("tool", "3")), ("A", "B")),
        Example(question, ((call,), "B")),
        Example(question, (thought, "B")),
    ):
        for tokenizer in (ByteTokenizer(), HuggingFaceTokenizer(make_tokenizer("byte-level"))):
            with pytest.raises(
                ExampleError, match=r"should have a chat template, but .* none: .* leave the row out\.$"
            ):
                tokenize_examples([example], tokenizer, 64)
    silent = Message("user", "Q", {"id": 7})  # says nothing that a template is needed for
    assert shown(ByteTokenizer(), Example((silent,), ("A", "B")))[0] == "<bos><user>Q<assistant>"
