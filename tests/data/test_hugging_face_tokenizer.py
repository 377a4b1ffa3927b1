"""Hugging Face tokenizers: what they put before, between and after the text."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_wrapper.data import (
    ByteTokenizer,
    Example,
    HuggingFaceTokenizer,
    Message,
    load_tokenizer,
)
from helpers import tokenizers as tiny
from helpers.datasets import tokenize_example

Load = Callable[..., HuggingFaceTokenizer]

DIALOGUE = (Message("system", "Be kind."), Message("user", "How are you?"))
CHAT = (*DIALOGUE, Message("assistant", "Fine."), Message("user", "Really?"))
CHATML = {"eos": "<|im_end|>", "template": tiny.CHATML}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Tokenizers by their special tokens, each through a folder and the real AutoTokenizer."""
    made: dict[Any, HuggingFaceTokenizer] = {}

    def make(**options: Any) -> HuggingFaceTokenizer:
        key = tuple(sorted(options.items()))
        if key not in made:
            folder = tiny.save_tokenizer(tmp_path_factory.mktemp("tokenizer"), **options)
            made[key] = HuggingFaceTokenizer.load(folder)
        return made[key]

    return make


def shown(tokenizer: HuggingFaceTokenizer, ids: list[int]) -> str:
    """Text with its special tokens."""
    return tokenizer.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.characters(exclude_characters="<", exclude_categories=["Cs"])))
def test_hugging_face_round_trip(load: Load, text: str) -> None:
    tokenizer = load()
    assert tokenizer.decode(tokenizer.prompt_ids(text)) == text
    assert tokenizer.decode(tokenizer.completion_ids("Q", text)) == text
    assert max(tokenizer.encode(text), default=0) < tokenizer.vocab_size


@pytest.mark.pitfall(11)
@pytest.mark.parametrize("prompt", ["How are you?", "<s>How are you?", DIALOGUE, CHAT])
@pytest.mark.parametrize("template", [None, tiny.CHATML, tiny.WITH_BOS])
def test_one_bos_if_there_is_one(load: Load, prompt: Any, template: str | None) -> None:
    tokenizer = load(template=template)
    ids = tokenizer.prompt_ids(prompt)
    assert ids[0] == tokenizer.bos_id == 0 and ids.count(0) == 1
    assert tokenizer.bos_id not in tokenizer.completion_ids(prompt, "Fine.")


@pytest.mark.pitfall(11)
@pytest.mark.parametrize("prompt", ["How are you?", DIALOGUE])
def test_no_bos_where_there_is_none(load: Load, prompt: Any) -> None:
    tokenizer = load(bos=None, **CHATML)
    assert tokenizer.bos_id is None
    assert 0 not in tokenizer.prompt_ids(prompt)
    assert shown(tokenizer, tokenizer.prompt_ids("How are you?")) == "How are you?"


@pytest.mark.pitfall(11)
@pytest.mark.parametrize("prompt", ["How are you?", DIALOGUE])
@pytest.mark.parametrize("completion", ["Fine.", "Fine.{eos}", "", "{eos}", " Fine.\n", "Fine. "])
@pytest.mark.parametrize("template", [None, tiny.CHATML, tiny.TRIMS, tiny.WITHOUT_EOS])
@pytest.mark.parametrize("eos", ["</s>", "<|im_end|>"])
def test_exactly_one_eos_at_the_end(
    load: Load, prompt: Any, completion: str, template: str | None, eos: str
) -> None:
    tokenizer = load(eos=eos, template=template)
    ids = tokenizer.completion_ids(prompt, completion.format(eos=eos))
    assert ids[-1] == tokenizer.eos_id and ids.count(tokenizer.eos_id) == 1
    assert ("Fine." in completion) == ("Fine." in shown(tokenizer, ids))


@pytest.mark.parametrize("prompt", ["How are you?", DIALOGUE])
@pytest.mark.parametrize("template", [None, tiny.CHATML])
@pytest.mark.parametrize(
    ("completion", "name", "token"),
    [("Fine.</s> And you?", "EOS", "</s>"), ("</s></s>", "EOS", "</s>"), ("<s>Fine.", "BOS", "<s>")],
)
def test_special_tokens_inside_a_completion(
    load: Load, prompt: Any, template: str | None, completion: str, name: str, token: str
) -> None:
    wanted = (
        f"the completion should not hold the {name} token, but '{token}' is in it: remove it from the text"
    )
    with pytest.raises(ValueError, match=wanted):
        load(template=template).completion_ids(prompt, completion)


@pytest.mark.pitfall(11)
@pytest.mark.parametrize(
    ("options", "pad_id"),
    [
        ({}, 2),
        ({"pad": None}, -100),
        ({"pad": "</s>"}, -100),
        ({"pad": "<s>"}, -100),
        ({"unk": "<pad>"}, -100),
    ],
)
def test_pad_is_never_a_token_of_the_text(load: Load, options: dict[str, Any], pad_id: int) -> None:
    tokenizer = load(**options)
    assert tokenizer.pad_id == pad_id
    assert tokenizer.completion_ids("Q", "A")[-1] == tokenizer.eos_id == 1


def test_gpt2_style_bos_and_eos_alike(load: Load) -> None:
    tokenizer = load(bos="</s>", pad=None)
    assert tokenizer.prompt_ids("Hello")[0] == tokenizer.completion_ids("Hello", "there")[-1] == 1
    assert tokenizer.pad_id == -100


@pytest.mark.pitfall(10)
def test_plain_prompt_and_completion_are_tokenized_separately(load: Load) -> None:
    tokenizer = load()
    together = tokenizer.encode("capital")
    assert len(together) < len(tokenizer.encode("capi") + tokenizer.encode("tal"))
    assert tokenizer.prompt_ids("capi")[1:] == tokenizer.encode("capi")
    assert tokenizer.completion_ids("capi", "tal")[:-1] == tokenizer.encode("tal")
    bare = load(bos=None)
    pair = tokenize_example(Example("capi", ("tal", "tain")), bare, 64)
    assert [bare.decode(ids) for ids in (pair.prompt, pair.chosen, pair.rejected)] == ["capi", "tal", "tain"]


def test_chat_template(load: Load) -> None:
    tokenizer = load(bos=None, **CHATML)
    assert shown(tokenizer, tokenizer.prompt_ids(DIALOGUE)) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert shown(tokenizer, tokenizer.completion_ids(DIALOGUE, "Fine.")) == "Fine.<|im_end|>"
    specials = [token for token in tokenizer.prompt_ids(DIALOGUE) if token < 5]
    assert specials == [3, 4, 3, 4, 3]
    assert tokenizer.completion_ids(DIALOGUE, "Fine.") == [*tokenizer.encode("Fine."), 4]


def test_chat_template_whose_turns_do_not_end_in_the_eos(load: Load) -> None:
    tokenizer = load(bos=None, template=tiny.CHATML)
    assert shown(tokenizer, tokenizer.completion_ids(DIALOGUE, "Fine.")) == "Fine.<|im_end|>\n</s>"


def test_special_tokens_of_a_template_are_parsed_whatever_the_tokenizer_was_told(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tiny.save_tokenizer(tmp_path, **CHATML)
    split = AutoTokenizer.from_pretrained(str(tmp_path), split_special_tokens=True)
    assert HuggingFaceTokenizer(split).prompt_ids(DIALOGUE) == HuggingFaceTokenizer.load(tmp_path).prompt_ids(
        DIALOGUE
    )


def test_without_a_template_dialogues_are_text_turns(load: Load) -> None:
    tokenizer = load()
    assert shown(tokenizer, tokenizer.prompt_ids(CHAT)) == (
        "<s>Be kind.\n\nHuman: How are you?\n\nAssistant: Fine.\n\nHuman: Really?\n\nAssistant:"
    )
    assert shown(tokenizer, tokenizer.completion_ids(CHAT, "Yes.")) == " Yes.</s>"
    assert tokenizer.completion_ids(CHAT, "") == [1]
    assert shown(tokenizer, tokenizer.prompt_ids(DIALOGUE[1:]))[:10] == "<s>\n\nHuman"
    tool = (*DIALOGUE, Message("tool", "42"), Message("system", "Now."))
    assert shown(tokenizer, tokenizer.prompt_ids(tool)).endswith("\n\nTool: 42\n\nSystem: Now.\n\nAssistant:")


@pytest.mark.pitfall(10)
@pytest.mark.parametrize(
    ("template", "prompt", "message"),
    [
        (
            tiny.NO_PREFIX,
            DIALOGUE,
            "template should render a dialogue that begins with its prompt .* but it does not: use another",
        ),
        (
            tiny.DROPS_THOUGHT,
            DIALOGUE,
            "should keep the answer whole, but a part of it is missing: use another",
        ),
        (
            tiny.ALTERNATES,
            CHAT,
            "should take the roles system, user, .* but it raises 'roles must alternate': change the",
        ),
        (
            tiny.CRASHES,
            DIALOGUE,
            "chat template should take the roles system, user, but it raises 'can only concatenate str",
        ),
        ("{{ nonsense.of.it }}", DIALOGUE, "chat template should take the roles system, user, but it raises"),
        ("{% if %}", DIALOGUE, "chat template should take the roles system, user, but it raises"),
    ],
    ids=["no prefix", "drops a part", "raises", "crashes", "undefined", "no template at all"],
)
def test_a_template_that_does_not_fit_is_refused(
    load: Load, template: str, prompt: tuple[Message, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(eos="<|im_end|>", template=template).completion_ids(prompt, "hm </think> Fine.")
    assert "\n" not in str(caught.value)


def test_what_follows_the_eos_in_a_template_is_cut(load: Load) -> None:
    tokenizer = load(eos="<|im_end|>", template=tiny.SAYS_MORE)
    assert shown(tokenizer, tokenizer.completion_ids(DIALOGUE, "Fine.")) == "Fine.<|im_end|>"


def test_a_tokenizer_without_eos(tmp_path: Path) -> None:
    tiny.save_tokenizer(tmp_path, eos=None)
    with pytest.raises(
        ValueError, match=r"the tokenizer should have an EOS token, but this .* has none: set its eos"
    ):
        load_tokenizer(str(tmp_path))


@pytest.mark.slow
def test_fingerprints(tmp_path: Path, load: Load) -> None:
    prints = [load(**options).fingerprint() for options in ({}, {"bos": None}, {"template": tiny.CHATML})]
    assert len({*prints, ByteTokenizer().fingerprint()}) == 4
    load().save(tmp_path)
    again = load_tokenizer(tmp_path)
    again.encode("Hello there")
    again.tokenizer("Hello", padding="max_length", truncation=True, max_length=4)  # type: ignore[attr-defined]
    assert again.fingerprint() == prints[0]
    code = "import sys; from dpo_wrapper.data import load_tokenizer as l; print(l(sys.argv[1]).fingerprint())"
    env = {**os.environ, "PYTHONHASHSEED": "99", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == prints[0]
