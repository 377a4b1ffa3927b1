"""TEMPLATE writes what the chat template does, for templates of all kinds and dialogues of any length."""

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_wrapper.commands.export.ollama.go_template import GoTemplate
from dpo_wrapper.commands.export.ollama.modelfile import Modelfile, parse_modelfile
from dpo_wrapper.commands.export.ollama.ollama_template import OllamaTemplate, make_template
from dpo_wrapper.commands.export.ollama.pieces import probe_chat_template
from dpo_wrapper.commands.export.ollama.verify import check_template, render_as_ollama
from dpo_wrapper.data import HuggingFaceTokenizer, Message
from dpo_wrapper.data.rows.messages import Turns
from helpers.ollama_templates import OWN, SHIPPED, build_tokenizer, make_tokenizer
from helpers.tokenizers import CHATML

REFUSED = ("counted", "twice")
NAMES = [name for name in (*OWN, *SHIPPED) if name not in REFUSED]
WITHOUT_SYSTEM = ("mistral_alternates", "gemma")

_MADE: dict[tuple[str, bool], tuple[HuggingFaceTokenizer, OllamaTemplate]] = {}


def make(name: str, *, adds_bos: bool = False) -> tuple[HuggingFaceTokenizer, OllamaTemplate]:
    """A tokenizer with its TEMPLATE, made once."""
    if (name, adds_bos) not in _MADE:
        tokenizer = make_tokenizer(name)
        _MADE[name, adds_bos] = tokenizer, make_template(tokenizer, adds_bos=adds_bos)
    return _MADE[name, adds_bos]


def mark(tokenizer: HuggingFaceTokenizer, turns: Turns) -> Turns:
    return tuple(replace(turn, content=tokenizer.template.mark(turn.text)) for turn in turns)


contents = st.text(st.sampled_from('ab 1{}"\\-$.%<|>/s[]\n\té日🙂'), max_size=12).map(
    lambda text: f"Q{text}Z"
)
special = st.sampled_from(["Q{{ .Content }}Z", 'Q"""\nZ', "Q{{- end }}\nZ", "Q<|im_end|>Z", "Q</s>{%x%}Z"])


@st.composite
def dialogues(draw: Any) -> Turns:
    """A dialogue of any length, with or without a system message, ended by a question or an answer."""
    length = draw(st.integers(1, 13))
    roles = ["system"] * draw(st.booleans()) + [("user", "assistant")[k % 2] for k in range(length)]
    return tuple(Message(role, draw(contents | special)) for role in roles)


@settings(max_examples=60)
@given(st.sampled_from(NAMES), dialogues(), st.booleans())
def test_template_writes_what_the_chat_template_does(name: str, turns: Turns, adds_bos: bool) -> None:
    tokenizer, template = make(name, adds_bos=adds_bos)
    expected = turns
    if turns[0].role == "system" and name in WITHOUT_SYSTEM:
        system, first, *others = turns
        expected = (replace(first, content=f"{system.text}\n\n{first.text}"), *others)
    if name == "mistral_last" and turns[0].role == "system" and turns[-1].role == "assistant":
        return  # the chat template leaves the system message out there
    text = render_as_ollama(GoTemplate(template.text), mark(tokenizer, turns))
    bos = tokenizer.tokenizer.bos_token or ""
    wanted = tokenizer.write_prompt(expected)
    assert text == (wanted.removeprefix(bos) if adds_bos else wanted)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_text_and_bos_become_the_ids_of_the_prompt(name: str, adds_bos: bool) -> None:
    tokenizer, template = make(name, adds_bos=adds_bos)
    turns = (Message("user", "Hello there"), Message("assistant", "I am fine"), Message("user", "Human?"))
    text = render_as_ollama(GoTemplate(template.text), turns)
    bos_text, ids = tokenizer.tokenizer.bos_token, tokenizer.encode_prompt(turns)
    begins = bos_text is not None and ids[0] == tokenizer.bos_id
    assert text.startswith(bos_text or " ") == (begins and not adds_bos)
    bos = [tokenizer.bos_id] if adds_bos and begins else []
    assert [*bos, *tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]] == ids


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("chatml", ("<|im_end|>",)),
        ("llama3", ("<|eot_id|>", "<|end_of_text|>")),
        ("gemma", ("<end_of_turn>", "<eos>")),
        ("phi3", ("<|end|>", "<|endoftext|>")),
        ("mistral", ("</s>",)),
        ("plain_turns", ("user>", "</s>")),
        ("qwen2_5", ("<|im_end|>", "<|endoftext|>")),
    ],
)
def test_answers_end_at_every_end_token(name: str, stops: tuple[str, ...]) -> None:
    tokenizer = make_tokenizer(name)
    ends = [tokenizer.tokenizer.convert_tokens_to_ids(stop) for stop in stops if stop != "user>"]
    assert make_template(tokenizer, ends, adds_bos=False).stops == stops


def test_opening_token_of_the_next_question_ends_an_answer_without_an_end() -> None:
    template = CHATML.replace("<|im_end|>\n", "")
    tokenizer = HuggingFaceTokenizer(build_tokenizer(template, None, "</s>"))
    assert make_template(tokenizer, adds_bos=False).stops == ("<|im_start|>", "</s>")


@pytest.mark.parametrize(
    ("name", "system"),
    [
        ("chatml", ""),
        ("chatml_default", "You are a tiny helper."),
        ("qwen2_5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        ("vicuna", "A chat."),
        ("llama3_2", ""),  # a block with the date, which stands in front of every system message
        ("nemotron_3_nano", ""),  # an empty block
    ],
)
def test_default_system_message(name: str, system: str) -> None:
    assert make(name)[1].system == system


def test_template_of_a_common_kind_is_as_ollama_writes_its_own() -> None:
    assert make("chatml_default")[1].text == (
        "{{ range $i, $_ := .Messages }}\n"
        "{{- $last := eq (len (slice $.Messages $i)) 1 }}\n"
        '{{- if and (eq $i 0) (ne .Role "system") }}<|im_start|>system\n'
        "You are a tiny helper.<|im_end|>\n"
        "{{ end }}\n"
        '{{- if eq .Role "system" }}<|im_start|>system\n'
        "{{ .Content }}<|im_end|>\n"
        '{{ else if eq .Role "user" }}<|im_start|>user\n'
        "{{ .Content }}<|im_end|>\n"
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n'
        "{{ .Content }}\n"
        "{{- if not $last }}<|im_end|>\n"
        "{{ end }}\n"
        "{{- end }}\n"
        '{{- if and $last (ne .Role "assistant") }}<|im_start|>assistant\n'
        "{{ end }}\n"
        "{{- end }}"
    )


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_go_cannot_write(name: str) -> None:
    with pytest.raises(ValueError, match=r"write the TEMPLATE by hand.*llama-server --jinja"):
        make_template(make_tokenizer(name), adds_bos=False)


@pytest.mark.parametrize("old", ["<|im_end|>", "user\n", "{{- end }}", "not $last", "$last (ne", "helper"])
def test_wrong_template_is_found_out(old: str) -> None:
    tokenizer, template = make("chatml_default")
    pieces = probe_chat_template(tokenizer, adds_bos=False)
    check_template(template.text, pieces, tokenizer)
    for match in re.finditer(re.escape(old), template.text):
        text = template.text[: match.start()] + template.text[match.end() :]
        with pytest.raises(ValueError, match="template"):
            check_template(text, pieces, tokenizer)


# thoughts


@pytest.mark.parametrize("name", ["qwen3", "nemotron_3_nano", "deepseek_r1_distill"])
def test_thoughts_of_earlier_answers_are_left_out(name: str) -> None:
    tokenizer, template = make(name)
    turns = (
        Message("user", "1+1?"),
        Message("assistant", "2", {"thinking": "Twice."}),
        Message("user", "2+2?"),
    )
    without = (turns[0], Message("assistant", "2"), turns[2])
    text = render_as_ollama(GoTemplate(template.text), turns)
    assert text == tokenizer.write_prompt(without) and "Twice" not in text
    assert any("0.9" in note for note in template.notes)


@pytest.mark.parametrize("name", ["qwen3", "nemotron_3_nano"])
def test_thought_of_an_answer_that_goes_on_is_kept(name: str) -> None:
    tokenizer, template = make(name)
    question = Message("user", "1+1?")
    said = Message("assistant", "<think>\nTwice.\n</think>\n\n2")
    text = render_as_ollama(
        GoTemplate(template.text), (question, Message("assistant", "2", {"thinking": "Twice."}))
    )
    assert text == tokenizer.write_prompt((question, said)) and "Twice." in text


@pytest.mark.parametrize("name", ["qwen3", "nemotron_3_nano", "deepseek_r1_distill", "glm4moe"])
def test_tags_of_thoughts_are_where_ollama_looks_for_them(name: str) -> None:
    """The first and the last text of the block around .Thinking, without white space."""
    block = re.compile(r"\}\}([^{}]*)\{\{ \.Thinking \}\}([^{}]*)\{\{ (?:end|else)")
    (tags,) = block.findall(make(name)[1].text)
    assert [tag.strip() for tag in tags] == ["<think>", "</think>"]


@pytest.mark.parametrize("name", ["qwen3", "nemotron_3_nano"])
def test_thoughts_can_be_switched_off(name: str) -> None:
    tokenizer, template = make(name)
    turns = (Message("user", "1+1?"),)
    options = {"enable_thinking": False}
    switched = HuggingFaceTokenizer(tokenizer.tokenizer, template_arguments=options)
    parsed = GoTemplate(template.text)
    assert render_as_ollama(parsed, turns, False) == switched.write_prompt(turns)
    assert render_as_ollama(parsed, turns, True) == tokenizer.write_prompt(turns)
    always = make_template(switched, adds_bos=False)
    assert render_as_ollama(GoTemplate(always.text), turns) == switched.write_prompt(turns)
    assert "IsThinkSet" not in always.text


@pytest.mark.parametrize("name", ["qwen3_8", "glm4moe"])
def test_switch_that_changes_earlier_turns_is_left_out(name: str) -> None:
    template = make(name)[1]
    assert "IsThinkSet" not in template.text
    assert any("switched off" in note for note in template.notes)


# what a template of Go cannot do, in notes


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama3_2", "date"),
        ("gemma", "no system message"),
        ("llama3", "white space"),
        ("qwen2_5", "tools"),
    ],
)
def test_notes_tell_what_is_left_out(name: str, words: str) -> None:
    assert any(words in note for note in make(name)[1].notes)
    assert not any(words in note for note in make("chatml")[1].notes)


@pytest.mark.parametrize("name", NAMES)
def test_template_survives_the_modelfile(name: str) -> None:
    template = make(name)[1]
    modelfile = Modelfile("./model.gguf", template.text, template.stops, template.system)
    assert parse_modelfile(modelfile.format()) == modelfile
    assert '"""' not in template.text
