"""Every kind of tokenizer: a completion's ids are those that follow the prompt's own in the whole text."""

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_wrapper.data import HuggingFaceTokenizer, Message
from helpers.tokenizer_kinds import CHATML, KINDS, LLAMA_2, ZEPHYR, make_tokenizer

pytest.importorskip("jinja2")

PREFIXED = [kind for kind in KINDS if kind not in ("byte-level", "metaspace never", "wordpiece")]
"""These put a dummy blank in front of a text, which no completion may get."""

QUESTION = (Message("user", "What is it?"),)


def load(kind: str, template: str | None = None) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(make_tokenizer(kind, template))


def tokens(tokenizer: HuggingFaceTokenizer, ids: list[int]) -> str:
    """Tokens in one line: ▁ is a blank, ⏎ a line break, whatever the kind writes for them."""
    text = " ".join(tokenizer.tokenizer.convert_ids_to_tokens(ids))
    return text.replace("Ġ", "▁").replace("Ċ", "⏎").replace("\n", "⏎").replace("[SEP]", "</s>")


def ends(kind: str, shown: str) -> str:
    """The expected tokens of a kind: `It` after a line break is `It` only where that token was learned."""
    if kind == "unigram":
        shown = shown.replace("noon.", "noon .")
    elif kind == "wordpiece":
        shown = shown.replace("▁", "").lower().replace("noon.", "noon .")
    elif kind in PREFIXED:
        shown = shown.replace("_It", "I t")
    if kind.startswith("byte-level"):
        shown = shown.replace("noon.", "noon .")
    return shown.replace("_", "")


@pytest.mark.pitfall(10)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("template", "expected"),
    [  # Zephyr and ChatML end a prompt in a line break, Llama 2 writes a blank before and after an answer
        (ZEPHYR, "_It ▁is ▁noon. </s>"),
        (CHATML, "_It ▁is ▁noon. </s>"),
        (LLAMA_2, "▁It ▁is ▁noon. ▁ </s>"),
    ],
    ids=["zephyr", "chatml", "llama 2"],
)
def test_golden_completion_of_a_dialogue(kind: str, template: str, expected: str) -> None:
    tokenizer = load(kind, template)
    encoded = tokenizer.encode_example(QUESTION, ["It is noon."])
    shown = ends(kind, expected.replace("_It", "It") if kind == "unigram" else expected)
    if kind == "wordpiece":
        shown = " ".join(shown.split())  # it knows no blanks
    ids = encoded.completions[0]
    if kind == "wordpiece" and template == CHATML:
        assert tokenizer.tokenizer.convert_ids_to_tokens(ids)[-1] == "</s>"  # the template's, not the EOS
    assert tokens(tokenizer, ids) == shown and not encoded.is_continued and not encoded.is_cut


PLAIN = [  # prompt, completion, tokens, whether a token of the whole text spans the border
    ("What is it?", " It is noon.", "▁It ▁is ▁noon. </s>", False),
    ("What is it?\n", "It is noon.", "_It ▁is ▁noon. </s>", False),
    ("The ca", "pital", "p ital </s>", True),
    ("Paris", " is late.", "▁is ▁late. </s>", False),
    ("What is it?", "", "</s>", False),
]


@pytest.mark.pitfall(10)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("unigram", "wordpiece")])
@pytest.mark.parametrize(("prompt", "completion", "expected", "is_continued"), PLAIN)
def test_golden_completion_of_a_text(
    kind: str, prompt: str, completion: str, expected: str, is_continued: bool
) -> None:
    tokenizer = load(kind)
    encoded = tokenizer.encode_example(prompt, [completion])
    if kind.startswith("byte-level"):
        expected = expected.replace("late.", "late .")
    assert tokens(tokenizer, encoded.completions[0]) == ends(kind, expected)
    assert encoded.is_continued == is_continued
    assert encoded.prompt == tokenizer.tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(encoded.prompt + encoded.completions[0]).lstrip() == prompt + completion


def test_golden_ids_of_wordpiece() -> None:
    """It lower-cases, and marks pieces inside a word: the rest of a word is such a piece."""
    tokenizer = load("wordpiece")
    own = tokenizer.tokenizer
    encoded = tokenizer.encode_example("The ca", ["pital IS."])
    assert own.convert_ids_to_tokens(encoded.prompt) == ["[CLS]", "the", "ca"] and encoded.is_continued
    assert own.convert_ids_to_tokens(encoded.completions[0]) == ["##pi", "##tal", "is", ".", "[SEP]"]
    encoded = tokenizer.encode_example("What is it?", ["It is noon."])
    assert own.convert_ids_to_tokens(encoded.prompt) == ["[CLS]", "what", "is", "it", "?"]
    assert own.convert_ids_to_tokens(encoded.completions[0]) == ["it", "is", "noon", ".", "[SEP]"]


def test_golden_ids_of_unigram() -> None:
    tokenizer = load("unigram")
    encoded = tokenizer.encode_example("What is it?\n", ["It is noon."])
    assert tokens(tokenizer, encoded.prompt) == "<s> ▁What ▁is ▁it ? ⏎"
    assert tokens(tokenizer, encoded.completions[0]) == "It ▁is ▁noon . </s>"


@pytest.mark.pitfall(11)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [None, ZEPHYR, LLAMA_2, CHATML])
def test_special_tokens_that_a_text_spells_stay_text(kind: str, template: str | None) -> None:
    """In prompts, completions, roles' contents and the turns between."""
    tokenizer = load(kind, template)
    specials = {id_ for id_, token in tokenizer.tokenizer.added_tokens_decoder.items() if token.special}
    text = "a</s> b <s>c<unk> [SEP]d[CLS]"
    turns = [Message("system", "S"), Message("user", "U"), Message("assistant", "A"), Message("user", "V")]
    plain = tokenizer.encode_example(tuple(turns), ["W"])
    spelled = [Message(turn.role, turn.text + text) for turn in turns]
    encoded = tokenizer.encode_example(tuple(spelled), ["W" + text])
    for one, other in ((plain.prompt, encoded.prompt), (plain.completions[0], encoded.completions[0])):
        assert [id_ for id_ in other if id_ in specials] == [id_ for id_ in one if id_ in specials]
    assert squeeze(tokenizer.decode(encoded.completions[0], skip_special_tokens=False)).startswith(
        squeeze("W" + text)
    )
    given = tokenizer.encode_example(f"a {text}", [f" b{text}"])
    assert [id_ for id_ in given.prompt if id_ in specials] == [tokenizer.bos_id]
    assert [id_ for id_ in given.completions[0] if id_ in specials] == [tokenizer.eos_id]
    assert squeeze(tokenizer.decode(given.prompt)) == squeeze(f"a {text}")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "wordpiece"])
@pytest.mark.parametrize(
    ("prompt", "is_written"),
    [
        ("<s>dog</s> shows what?", False),  # HTML
        ("What does <s>dog</s> show?", False),
        ("</s> is what?", False),
        ("<s>[INST] What? [/INST] It is.</s><s>[INST] Is it? [/INST]", True),
        ("<s>USER: What? ASSISTANT: It is.</s>USER: Is it? ASSISTANT:", True),
        ("<s>What is it?", True),
        ("What is it?", False),
    ],
)
def test_a_tag_is_no_control_token(kind: str, prompt: str, is_written: bool) -> None:
    tokenizer = load(kind)
    assert tokenizer.is_template_text(prompt) == is_written
    ids = tokenizer.encode_prompt(prompt)
    assert ids[0] == tokenizer.bos_id
    controls = prompt.count("<s>") + prompt.count("</s>") + (not prompt.startswith("<s>"))
    assert sum(id_ in (tokenizer.bos_id, tokenizer.eos_id) for id_ in ids) == (controls if is_written else 1)
    assert is_written or squeeze(prompt) in squeeze(tokenizer.decode(ids, skip_special_tokens=False))


def squeeze(text: str) -> str:
    return "".join(text.split()).lower()


SOURCE = st.text(alphabet="aIt is.?noPr\n</s>", max_size=14)


@settings(max_examples=150)
@given(SOURCE.filter(str.strip), SOURCE)
@example("<", "a</s>")
@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_completion_decode_to_their_source(kind: str, prompt: str, completion: str) -> None:
    tokenizer = load(kind)
    if prompt.lstrip().startswith(("<s>", "</s>")):
        prompt = "a" + prompt  # a prompt that begins with a special token is one of a template's
    encoded = tokenizer.encode_example(prompt, [completion])
    ids = encoded.completions[0]
    assert encoded.prompt == tokenizer.encode_prompt(prompt)
    assert ids[-1] == tokenizer.eos_id and ids.count(tokenizer.eos_id) == 1
    text = tokenizer.decode(encoded.prompt + ids[:-1])
    eos = tokenizer.tokenizer.eos_token  # of wordpiece another
    while completion.rstrip().endswith(eos):
        completion = completion.rstrip().removesuffix(eos)
    source = prompt + completion
    if kind == "wordpiece":
        assert squeeze(text) == squeeze(source)
    elif kind in PREFIXED:
        assert text in (
            source,
            f" {source}",
            source.removeprefix(" "),
        )  # one blank at the front is the kind's
    else:
        assert text == source
    whole = tokenizer.encode_prompt(source)
    if not encoded.is_continued:
        assert encoded.prompt + ids[:-1] == whole


TURN = st.text(alphabet="aIt is.?noPr\n", min_size=1, max_size=12).map(str.strip).filter(bool)


@settings(max_examples=60)
@given(st.lists(TURN, min_size=1, max_size=3), TURN)
@pytest.mark.parametrize("template", [ZEPHYR, LLAMA_2, CHATML], ids=["zephyr", "llama 2", "chatml"])
@pytest.mark.parametrize("kind", KINDS)
def test_dialogues_are_the_whole_text(kind: str, template: str, questions: list[str], answer: str) -> None:
    """Ids of prompt and completion together are those of the text that the template writes, up to its end."""
    tokenizer = load(kind, template)
    own = tokenizer.tokenizer
    turns = [Message("user", questions[0])]
    for question in questions[1:]:
        turns += [Message("assistant", "It is."), Message("user", question)]
    encoded = tokenizer.encode_example(tuple(turns), [answer])
    messages: list[Any] = [turn.as_dict() for turn in turns]
    options = {"add_generation_prompt": True, "return_dict": False}
    assert encoded.prompt == own.apply_chat_template(messages, **options)
    whole = own.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False)
    end = "</s>" if template == CHATML or kind != "wordpiece" else "[SEP]"
    whole = whole[: whole.rindex(end) + len(end)]
    if not encoded.is_continued:
        assert encoded.prompt + encoded.completions[0] == own(whole, add_special_tokens=False)["input_ids"]
    assert squeeze(tokenizer.decode(encoded.completions[0])) == squeeze(answer) or kind == "wordpiece"
