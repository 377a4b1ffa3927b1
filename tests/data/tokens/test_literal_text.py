"""The backend is called directly and with parts of texts: the ids are those of the tokenizer's own call."""

import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_wrapper.data import HuggingFaceTokenizer, Message
from dpo_wrapper.data.tokens.literal_text import MAX_PARTS
from helpers import tokenizers as tiny
from helpers.tokenizer_kinds import CHATML, KINDS, LLAMA_2, ZEPHYR, make_tokenizer

PARTS = st.sampled_from(
    [" It is", "noon. ", "</s>", "<s>", "\n", " ", "[INST]", "<unk>", "日é", "The ca", "[SEP]"]
)

TEXTS = st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=5)
"""Without the private characters with which special tokens are marked."""


def own_ids(tokenizer: HuggingFaceTokenizer, text: str) -> list[int]:
    return list(tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50)
@given(parts=st.lists(PARTS | TEXTS, max_size=8))
def test_ids_are_those_of_the_tokenizers_call(kind: str, parts: list[str]) -> None:
    """Also where unmarked special tokens cut the text, at its beginning, at its end and side by side."""
    tokenizer = HuggingFaceTokenizer(make_tokenizer(kind, CHATML))
    texts = ["".join(parts), "".join(parts[::-1]), "".join(parts)]
    for text in texts:
        assert tokenizer._literal.encode(text) == own_ids(tokenizer, text)
    assert tokenizer._literal.encode_all(texts) == [own_ids(tokenizer, text) for text in texts]


def test_what_a_users_call_has_left_behind_changes_nothing(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer.load(tiny.save_tokenizer(tmp_path))
    text = "It is noon. It is late."
    ids = tokenizer.encode(text)
    assert len(tokenizer.tokenizer(text, truncation=True, max_length=5)["input_ids"]) == 5
    assert tokenizer.encode(text) == ids
    assert len(tokenizer.tokenizer([text, "a"], padding="max_length", max_length=50)["input_ids"][0]) == 50
    assert tokenizer.encode(text) == ids and tokenizer._literal.encode_all([text, "It is"])[0] == ids
    spelled = "a</s>b"
    split = tokenizer.tokenizer(spelled, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer._literal.encode(spelled) != split and tokenizer.tokenizer.eos_token_id not in split


@pytest.mark.parametrize("template", [ZEPHYR, LLAMA_2, CHATML])
@pytest.mark.parametrize("kind", KINDS)
def test_turns_are_encoded_once(kind: str, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a prompt serve all completions, and give what the whole texts give."""
    pytest.importorskip("jinja2")
    tokenizer = HuggingFaceTokenizer(make_tokenizer(kind, template))
    turns = [Message(role, f"It is {k}.") for k in range(3) for role in ("user", "assistant")]
    prompt = (*turns, Message("user", "Is it </s> so?"))
    encoded = tokenizer.encode_example(prompt, ["It is.", "No."], score="assistant")
    given: list[str] = []
    uncut = HuggingFaceTokenizer(make_tokenizer(kind, template))
    monkeypatch.setattr(uncut._literal, "cutting_tokens", set())
    assert uncut.encode_example(prompt, ["It is.", "No."], score="assistant") == encoded

    encode = tokenizer._literal._encode
    monkeypatch.setattr(tokenizer._literal, "_encode_part", lambda text: given.append(text) or encode(text))
    tokenizer.encode_prompt(prompt)
    assert len(given) > 3 and max(map(len, given)) < 60


def test_many_parts_of_texts_and_a_copy_for_another_process() -> None:
    tokenizer = HuggingFaceTokenizer(make_tokenizer("byte-level"))
    text = "".join(f"It is {k}.</s>" for k in range(3 * MAX_PARTS))
    assert tokenizer._literal.encode(text) == own_ids(tokenizer, text)
    assert len(tokenizer._literal._parts) <= MAX_PARTS
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode_text("It is</s>", [(0, 1)]) == tokenizer.encode_text("It is</s>", [(0, 1)])


def test_a_class_of_someone_else_is_called_as_it_is(tmp_path: Path) -> None:
    """It may do more to a text than its backend does."""
    tokenizer = HuggingFaceTokenizer.load(tiny.save_tokenizer(tmp_path)).tokenizer

    class Upper(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: Any, **options: Any) -> Any:
            return super().__call__(text.upper(), **options)

    tokenizer.__class__ = Upper
    theirs = HuggingFaceTokenizer(tokenizer)
    assert (
        theirs.decode(theirs.encode("Hello"))
        == "HELLO"
        == theirs.decode(theirs._literal.encode_all(["hello"])[0])
    )
