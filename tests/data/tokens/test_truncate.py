"""Dialogues that are too long: the template stands whole around what is left of them."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_wrapper.data import ByteTokenizer, Example, Message
from dpo_wrapper.data.rows.messages import Turns, split_system
from dpo_wrapper.data.tokens.encode import fit_row
from dpo_wrapper.data.tokens.options import TokenizeOptions
from dpo_wrapper.data.tokens.tokenizers import load_tokenizer
from dpo_wrapper.data.tokens.truncate import cut_dialogue
from helpers.tokenizers import ALTERNATES, CHATML, save_tokenizer

BYTES = ByteTokenizer()


def make_turns(*texts: str, system: str | None = None) -> Turns:
    """Turns of user and assistant by turns, after one of the system."""
    turns = (Message(("user", "assistant")[k % 2], text) for k, text in enumerate(texts))
    return (*((Message("system", system),) if system is not None else ()), *turns)


TURNS = make_turns("one", "two", "three", "four", "five", system="Be kind.")


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (35, TURNS),
        (34, make_turns("three", "four", "five", system="Be kind.")),
        (27, make_turns("three", "four", "five", system="Be kind.")),
        (26, make_turns("five", system="Be kind.")),
        (16, make_turns("five", system="Be kind.")),
        (15, make_turns("five", system="Be kind")),  # the longest text is cut, a system's at its end
        (10, make_turns("five", system="Be")),
        (8, make_turns("ve", system="Be")),  # BOS and three roles are half of it
        (7, make_turns("five", system="Be kind.")),  # more than half: no text is cut
        (2, make_turns("five", system="Be kind.")),
    ],
)
def test_the_earliest_turns_go_first_and_then_the_longest_text(length: int, expected: Turns) -> None:
    assert cut_dialogue(TURNS, (), length, BYTES) == expected


def test_a_question_loses_its_front_between_characters() -> None:
    assert cut_dialogue(make_turns("aé€😀"), (), 8, BYTES) == make_turns("😀")  # 4 bytes of 8 that are left
    assert cut_dialogue(make_turns("a€😀"), (), 9, BYTES) == make_turns("😀")  # not a part of the one before


def test_what_follows_the_last_question_stays_with_it() -> None:
    opened = (*make_turns("one", "two", "three"), Message("assistant", "So"))
    assert cut_dialogue(opened, (), 10, BYTES) == make_turns("three", "So")
    assert cut_dialogue(opened, (), 7, BYTES) == make_turns("ee", "So")


_texts = st.text(st.characters(max_codepoint=0x2FFF, exclude_categories=("Cs",)), max_size=20)


@pytest.mark.pitfall(7)
@given(st.lists(_texts, min_size=1, max_size=7), st.none() | _texts, st.integers(10, 80))
def test_any_dialogue(texts: list[str], system: str | None, length: int) -> None:
    turns = make_turns(*texts, system=system)
    kept = cut_dialogue(turns, (), length, BYTES)
    assert len(BYTES.encode_prompt(kept)) <= length
    (old_system, old), (new_system, new) = split_system(turns), split_system(kept)
    assert new[0].role == "user" and len(new_system) == len(old_system)
    assert [turn.role for turn in new] == [turn.role for turn in old[len(old) - len(new) :]]
    pairs = list(zip(old[len(old) - len(new) :], new, strict=True))
    assert all(before.text.endswith(after.text) for before, after in pairs)
    if any(before != after for before, after in pairs) or old_system != new_system:
        assert sum(turn.role == "user" for turn in new) == 1
    elif len(new) < len(old):
        longer = turns[: len(old_system)] + old[len(old) - len(new) - 2 :]
        assert len(BYTES.encode_prompt(longer)) > length


@pytest.mark.parametrize("template", [CHATML, ALTERNATES])
def test_the_template_of_a_cut_prompt_is_that_of_a_shorter_dialogue(tmp_path: Path, template: str) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, bos=None, eos="<|im_end|>", template=template))
    system = None if template == ALTERNATES else "Be kind."
    turns = make_turns("How are you? " * 9, "Fine. " * 9, "What is the capital? " * 20, system=system)
    answers: Any = ("Paris.", "It is Paris, of course.")
    options = TokenizeOptions(max_length=64)
    whole = fit_row(Example(turns, answers), tokenizer, TokenizeOptions(max_length=999)).examples[0]
    row = fit_row(Example(turns, answers), tokenizer, options)
    (cut,) = row.examples
    assert cut.is_cut and row.counts["num_shortened_prompts"] and not row.counts["num_truncated_completions"]
    assert cut.completions == whole.completions
    assert 60 <= len(cut.prompt) + max(map(len, cut.completions)) <= 64
    text = tokenizer.decode(cut.prompt, skip_special_tokens=False)
    start = "" if system is None else "<|im_start|>system\nBe kind.<|im_end|>\n"
    assert text.startswith(f"{start}<|im_start|>user\n")
    assert text.endswith("the capital? <|im_end|>\n<|im_start|>assistant\n") and text.count("user\n") == 1


def test_turns_that_are_imitated_are_those_that_are_left() -> None:
    turns = make_turns("a" * 9, "b" * 9, "c", "d", "e")
    row = fit_row(Example(turns, ("f",)), BYTES, TokenizeOptions(max_length=12))
    (cut,) = row.examples
    ids = zip((*cut.prompt, *cut.completions[0]), cut.scored_masks()[0], strict=True)
    assert bytes(id_ for id_, is_scored in ids if is_scored and id_ < 256) == b"df"


@pytest.mark.parametrize("on_long", ["drop", "error"])
def test_a_dialogue_is_too_long_as_a_whole(on_long: Any) -> None:
    """Although it would fit without its earliest turns."""
    example = Example(make_turns("one " * 9, "two " * 9, "three"), ("four",))
    options = TokenizeOptions(max_length=30, on_long=on_long)
    if on_long == "error":
        with pytest.raises(ValueError, match=r"at most 30 tokens, but it has 87"):
            fit_row(example, BYTES, options)
    else:
        assert fit_row(example, BYTES, options).examples == ()


def test_a_question_stays_where_the_template_takes_most_of_the_room(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, bos=None, eos="<|im_end|>", template=CHATML))
    question = make_turns("What is the capital of France?")
    length = len(tokenizer.encode_prompt(question)) - 3
    kept = fit_row(Example(question, ("Paris " * 90,)), tokenizer, TokenizeOptions(max_length=4 * length))
    text = tokenizer.decode(kept.examples[0].prompt, skip_special_tokens=False)
    assert "capital of France?" in text
