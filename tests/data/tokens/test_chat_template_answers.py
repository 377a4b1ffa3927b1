"""Answers that are empty, begun, surrounded by white space or already ended, under real chat templates."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_wrapper.data import HuggingFaceTokenizer, to_example
from helpers.chat_templates import FAMILIES, assistant, control_tokens, encode, show, template_tokenizer, user

pytestmark = pytest.mark.slow

pytest.importorskip("trl")
pytest.importorskip("jinja2")

TRIMS = {"llama3", "llama3_1", "llama3_2", "gemma", "gemma3", "gemma4", "gemma4_v5", "glm4moe", "cohere"}
TRIMS |= {"qwen3", "qwen3_8", "qwen3_5_think", "qwen3_5_nothink", "nemotron_3_nano", "nemotron_3_super"}
"""Templates that drop white space around an answer."""


def load(template: str) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(template_tokenizer(template))


def scored(tokenizer: HuggingFaceTokenizer, prompt: list[Any], answer: list[Any]) -> str:
    text = show(tokenizer, encode(tokenizer, prompt, answer)).partition("⟦")[2]
    return text.removesuffix("⟧")


@pytest.mark.parametrize("template", FAMILIES)
def test_an_empty_answer_is_its_end(template: str) -> None:
    tokenizer = load(template)
    full, empty = (scored(tokenizer, [user("1+1?")], [assistant(text)]) for text in ("two", ""))
    assert empty == full.replace("\ntwo" if template == "glm4moe" else "two", "")
    assert empty.endswith(tokenizer.decode([tokenizer.end_of_turn_id], skip_special_tokens=False))


@pytest.mark.parametrize("template", FAMILIES)
def test_white_space_around_an_answer(template: str) -> None:
    """What the template keeps is scored, the line break in front of it too."""
    tokenizer = load(template)
    text = scored(tokenizer, [user("1+1?")], [assistant("\n two \n")])
    bare = scored(tokenizer, [user("1+1?")], [assistant("two")])
    if template in TRIMS:
        assert "".join(text.split()) == "".join(bare.split())
    elif template.startswith("phi3"):  # its tokens take the white space behind them
        assert text == bare.replace("two", "two \n")
    else:
        assert text == bare.replace("two", "\n two \n")


@pytest.mark.parametrize("template", FAMILIES)
def test_an_answer_that_brings_its_end(template: str) -> None:
    """The end of a turn that an exported answer carries is the template's, not text."""
    tokenizer = load(template)
    eos = tokenizer.tokenizer.eos_token
    turn = tokenizer.decode([tokenizer.end_of_turn_id], skip_special_tokens=False)
    bare = encode(tokenizer, [user("1+1?")], [assistant("two")])
    for end in (eos, turn, f"{turn}{eos}", f"{turn}\n"):
        ended = encode(tokenizer, [user("1+1?")], [assistant(f"two{end}")])
        assert ended.completions == bare.completions
    inside = scored(tokenizer, [user("1+1?")], [assistant(f"two{eos} three")])
    assert f"two{eos} three" in inside  # elsewhere it is text


@pytest.mark.parametrize("template", FAMILIES)
@pytest.mark.parametrize("begun", ["It is", "It is ", ""])
def test_an_answer_that_has_been_begun(template: str, begun: str) -> None:
    tokenizer = load(template)
    answer = "2." if begun.endswith(" ") else " 2."
    row = {
        "prompt": [user("1+1?"), assistant(begun)],
        "chosen": [assistant(answer)],
        "rejected": [assistant("3.")],
    }
    example = to_example(row)
    encoded = tokenizer.encode_example(example.prompt, example.completions)
    text = show(tokenizer, encoded)
    if not begun:  # nothing has been begun
        assert text == show(tokenizer, encode(tokenizer, [user("1+1?")], [assistant(answer)]))
        return
    assert text.partition("⟦")[0].rstrip().endswith("It is") and not encoded.is_cut
    whole = show(tokenizer, encode(tokenizer, [user("1+1?")], [assistant("It is 2.")]))
    assert text.replace("⟦", "").replace("⟧", "") == whole.replace("⟦", "").replace("⟧", "")
    assert text.partition("⟦")[2].lstrip().startswith("2.")


PIECES = [
    "a",
    "Is it",
    " ",
    "\n",
    "é",
    "雪",
    "<|im_end|>",
    "<|im_start|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
]
PIECES += [
    "<|return|>",
    "<|",
    "|>",
    "<｜User｜>",
    "[INST]",
    "</s>",
    "<s>",
    "<eos>",
    "<|channel|>final<|message|>",
]
TEXT = st.lists(st.sampled_from(PIECES), max_size=6).map(lambda pieces: "Q" + "".join(pieces) + "Z")


@settings(max_examples=40)
@given(TEXT, TEXT, TEXT)
@pytest.mark.parametrize(
    "template", ["llama3_1", "qwen3", "gemma3", "gptoss", "deepseekv3", "phi3", "glm4moe"]
)
def test_dialogues_decode_to_their_source(template: str, first: str, second: str, answer: str) -> None:
    """All texts stand in the tokens, in order, and no text makes a control token."""
    tokenizer = load(template)
    prompt = [user(first), assistant("R"), user(second)]
    encoded = encode(tokenizer, prompt, [assistant(answer)])
    given, written = (squeeze(tokenizer, ids) for ids in (encoded.prompt, encoded.completions[0]))
    questions = ["".join(text.split()) for text in (first, second)]
    assert given.find(questions[0]) < given.rfind(questions[1]) and "".join(answer.split()) in written
    plain = encode(tokenizer, [user("Q"), assistant("R"), user("Q")], [assistant("A")])
    controls = control_tokens(tokenizer)
    for ids, others in ((encoded.prompt, plain.prompt), (encoded.completions[0], plain.completions[0])):
        assert [id_ for id_ in ids if id_ in controls] == [id_ for id_ in others if id_ in controls]


def squeeze(tokenizer: HuggingFaceTokenizer, ids: list[int]) -> str:
    return "".join(tokenizer.decode(ids, skip_special_tokens=False).split())
