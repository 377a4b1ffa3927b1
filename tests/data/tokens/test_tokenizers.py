"""The byte tokenizer, and loading a tokenizer by its name."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_wrapper.data import ByteTokenizer, Message, load_tokenizer
from helpers import tokenizers as tiny


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode_prompt(text)) == text
    assert tokenizer.decode(tiny.encode_completion(tokenizer, "Q", text)) == text
    assert all(0 <= token < 256 for token in tokenizer.encode(text))


def test_bytes_layout() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode_prompt("hi") == [256, 104, 105]
    assert tiny.encode_completion(tokenizer, "hi", "yo") == [121, 111, 257]
    assert tiny.encode_completion(tokenizer, "hi", "") == [257]
    turns = tuple(Message(role, role[0]) for role in ("system", "user", "assistant", "tool"))
    assert tokenizer.encode_prompt(turns) == [256, 259, 115, 260, 117, 261, 97, 262, 116, 261]
    assert tiny.encode_completion(tokenizer, turns, "a") == [97, 257]
    assert tokenizer.vocab_size == 1 + max(tokenizer.role_ids.values())
    assert len({tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *tokenizer.role_ids.values()}) == 7
    assert tokenizer.decode([104, 258, -100, 0xFF]) == "h\ufffd"


def test_bytes_are_saved_and_loaded(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path / "made" / "here")
    loaded = load_tokenizer(tmp_path / "made" / "here")
    assert isinstance(loaded, ByteTokenizer)
    assert loaded.fingerprint() == load_tokenizer("bytes").fingerprint()
    assert len(loaded.fingerprint()) == 64


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    for name in (str(tmp_path), "no/such/model", str(tmp_path / "absent")):
        with pytest.raises(ValueError) as caught:
            load_tokenizer(name)
        message = str(caught.value)
        assert message.startswith(
            "the tokenizer should be a folder that holds one or the name of a model on the hub, but "
            f"'{name}' is neither"
        )
        assert "\n" not in message and "save a tokenizer there with save_pretrained" in message


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'dpo-wrapper\[train\]'"):
        load_tokenizer("no/such/model")
