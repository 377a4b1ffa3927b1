"""What a person said in a prompt that is known as tokens."""

from pathlib import Path

import pytest

from dpo_wrapper.data import ByteTokenizer, Message, Tokenizer
from dpo_wrapper.data.tokens.tokenizers import load_tokenizer
from dpo_wrapper.evaluation.prompts import decode_prompt, read_prompt
from helpers.tokenizers import ALTERNATES, CHATML, NO_PREFIX, save_tokenizer

SYSTEM, QUESTION = Message("system", "Be kind."), Message("user", "Who\n\nis it?")
ANSWER, AGAIN = Message("assistant", "Paris."), Message("user", "Why?")
DIALOGUE = "Human: Who\n\nis it?\n\nAssistant: Paris.\n\nHuman: Why?"

DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nI am.<|im_end|>\n{% endif %}" + CHATML
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'system' %}{% elif m.role == 'user' %}<s>[INST] "
    "{% if loop.index0 == 1 and messages[0].role == 'system' %}<<SYS>>\n{{ messages[0].content }}\n"
    "<</SYS>>\n\n{% endif %}{{ m.content }} [/INST]{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)


@pytest.fixture(params=["bytes", "none", CHATML, DEFAULT_SYSTEM, LLAMA_2, ALTERNATES, NO_PREFIX])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    """A tokenizer that writes dialogues with a template, or without one."""
    if request.param == "bytes":
        return ByteTokenizer()
    return load_tokenizer(
        save_tokenizer(tmp_path, template=None if request.param == "none" else request.param)
    )


def test_what_was_said_is_told_from_what_the_template_writes(tokenizer: Tokenizer) -> None:
    for turns, expected in (((QUESTION,), QUESTION.text), ((QUESTION, ANSWER, AGAIN), DIALOGUE)):
        assert read_prompt(tokenizer, tokenizer.encode_prompt(turns)) == expected
        try:
            ids = tokenizer.encode_prompt((SYSTEM, *turns))
        except ValueError:  # a template that takes no system's message
            continue
        assert read_prompt(tokenizer, ids) == expected


def test_plain_text_is_as_it_stands(tokenizer: Tokenizer) -> None:
    for text in ("Who\n\nis it?", "It is alpha.", ""):
        assert read_prompt(tokenizer, tokenizer.encode_prompt(text)) == text


def test_a_prompt_may_end_inside_what_opens_an_answer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, template=NO_PREFIX))
    example = tokenizer.encode_example((QUESTION,), ["Paris."])
    assert example.is_cut and read_prompt(tokenizer, example.prompt) == QUESTION.text


def test_a_template_that_takes_no_dialogue_is_shown(tmp_path: Path) -> None:
    single = "{% if messages[1] %}{{ raise_exception('one') }}{% endif %}{{ messages[0].content }}<|im_end|>"
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, template=single))
    ids = tokenizer.encode_prompt((AGAIN,))
    assert read_prompt(tokenizer, ids) == decode_prompt(tokenizer, ids) == "Why?<|im_end|>"


def test_turns_of_a_decoded_prompt_are_told_apart_but_no_bos_is_there() -> None:
    tokenizer = ByteTokenizer()
    assert decode_prompt(tokenizer, tokenizer.encode_prompt("cat?")) == "cat?"
    turns = (Message("user", "cat?"),)
    assert decode_prompt(tokenizer, tokenizer.encode_prompt(turns)) == "<bos><user>cat?<assistant>"


def test_a_template_that_writes_nothing_in_front(tmp_path: Path) -> None:
    turn = "{{ m.content }}{% if m.role == 'user' %}\n###\n{% else %}<|im_end|>{% endif %}"
    bare = "{% for m in messages %}" + turn + "{% endfor %}"
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, template=bare))
    for prompt in ((QUESTION,), "plain text ###\nq"):
        ids = tokenizer.encode_prompt(prompt)
        assert read_prompt(tokenizer, ids) == decode_prompt(tokenizer, ids)


def test_a_dialogue_that_the_model_begins_is_shown(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, template=CHATML))
    assert ANSWER.text in read_prompt(tokenizer, tokenizer.encode_prompt((ANSWER, AGAIN)))
