"""Rows to pairs of bounded length: what is cut, in which order, and what is left out."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_wrapper.data import (
    ByteTokenizer,
    EncodedRows,
    HuggingFaceTokenizer,
    Message,
    Row,
    RowError,
    TokenPair,
    encode_row,
    encode_rows,
)
from helpers import tokenizers as tiny

BYTES = ByteTokenizer()
BOS, EOS = 256, 257


class NoBos(ByteTokenizer):
    """Bytes without a BOS; the prompt '' has no token at all."""

    bos_id = None  # type: ignore[assignment]

    def prompt_ids(self, prompt: str | tuple[Message, ...]) -> list[int]:
        return super().prompt_ids(prompt)[1:]


_prompts = st.text(max_size=60) | st.lists(
    st.builds(Message, st.just("user"), st.text(max_size=20)), min_size=1
).map(tuple)


@given(
    _prompts,
    st.text(max_size=60),
    st.text(max_size=60),
    st.integers(8, 80),
    st.sampled_from([BYTES, NoBos()]),
)
def test_pitfalls_07_and_09_truncation(
    prompt: str | tuple[Message, ...], chosen: str, rejected: str, max_length: int, tokenizer: ByteTokenizer
) -> None:
    row = Row(prompt, chosen, rejected, where="here")
    pair = encode_row(row, tokenizer, max_length)
    whole = tokenizer.prompt_ids(prompt)
    sides = [tokenizer.completion_ids(prompt, text) for text in (chosen, rejected)]
    cut = [pair.chosen, pair.rejected]
    assert pair.where == "here"
    assert all(len(pair.prompt) + len(side) <= max_length for side in cut)
    # Completions lose their end only, keep a token at least, and an EOS is never put back.
    assert all(list(side) == full[: len(side)] and side for side, full in zip(cut, sides, strict=True))
    # The prompt loses its front only, and BOS stays.
    kept = list(pair.prompt)
    begins = [BOS] if tokenizer.bos_id == BOS else []
    assert kept[: len(begins)] == begins
    assert kept == whole or whole[len(whole) - len(kept) + len(begins) :] == kept[len(begins) :]
    # The prompt is shortened first, by no more than it must be, and not below a quarter.
    longest = max(map(len, sides))
    assert len(kept) == min(len(whole), max(max_length - longest, max_length // 4))
    if len(kept) > max_length // 4:
        assert [list(side) for side in cut] == sides


def test_truncation_by_hand() -> None:
    row = Row("abcdef", "xyz", "w")  # BOS and 6 bytes; 4 and 2 tokens
    assert encode_row(row, BYTES, 11) == TokenPair((BOS, *b"abcdef"), (*b"xyz", EOS), (*b"w", EOS))
    assert encode_row(row, BYTES, 10) == TokenPair((BOS, *b"bcdef"), (*b"xyz", EOS), (*b"w", EOS))
    assert encode_row(row, BYTES, 8) == TokenPair((BOS, *b"def"), (*b"xyz", EOS), (*b"w", EOS))
    row = Row("abcdef", "0123456789", "w")
    assert encode_row(row, BYTES, 8) == TokenPair((BOS, *b"f"), tuple(b"012345"), (*b"w", EOS))
    assert encode_row(row, BYTES, 12) == TokenPair((BOS, *b"ef"), tuple(b"012345678"), (*b"w", EOS))
    assert encode_row(Row("a", "0123456789", "w"), BYTES, 8).prompt == (BOS, *b"a")


def test_pitfall_11_an_eos_that_is_cut_off_is_not_trained() -> None:
    pair = encode_row(Row("Q", "0123456789", "01"), BYTES, 8)
    assert EOS not in pair.chosen and pair.rejected.count(EOS) == 1


def test_pitfall_07_pairs_that_teach_nothing_are_counted_and_left_out() -> None:
    rows = [
        Row("Q", "A", "B"),
        Row("Q", "A", "A"),
        Row("Q", "0123456789 one", "0123456789 two"),  # the same once both are cut
        Row("", "", "B"),  # without BOS the EOS is the first token of its sequence, and nothing predicts it
    ]
    encoded = encode_rows(rows, NoBos(), 8)
    assert encoded.entries == [TokenPair((81,), (65, EOS), (66, EOS))]
    assert (encoded.identical, encoded.empty, encoded.errors) == (2, 1, [])
    assert encoded.summary() == (
        "Left out of 4 rows: 2 with the same tokens on both sides, 1 with nothing to score."
    )
    assert len(encode_rows(rows[3:], BYTES, 8).entries) == 1


def test_pitfall_08_an_invalid_pair_among_them_changes_nothing() -> None:
    rows = [Row("Q", "A", "B"), Row("R", "C", "D")]
    assert (
        encode_rows([rows[0], Row("Q", "", ""), rows[1]], BYTES, 8).entries
        == encode_rows(rows, BYTES, 8).entries
    )


def test_counts_and_summary() -> None:
    rows = [Row("Q", "A", "B"), Row("Q" * 30, "A", "B"), Row("Q" * 30, "A" * 30, "B" * 30)]
    encoded = encode_rows(rows, BYTES, 16)
    assert (encoded.prompts_shortened, encoded.completions_cut) == (2, 2)
    assert encoded.summary() == "Cut to fit: 2 prompts at the front, 2 completions at the end."
    assert encode_rows(rows[:1], BYTES, 16).summary() == ""
    assert EncodedRows(encoded.entries, 1000, 0, 1, 0, [RowError("x")]).summary() == (
        "Left out of 1,004 rows: 1 with an error, 1,000 with the same tokens on both sides; "
        "cut to fit: 1 prompt at the front."
    )


def test_pitfall_10_tokenizer_errors_name_the_row(tmp_path: Path) -> None:
    tiny.save_tokenizer(tmp_path, eos="<|im_end|>", template=tiny.NO_PREFIX)
    tokenizer = HuggingFaceTokenizer.load(tmp_path)
    turns = (Message("user", "Hello"),)
    rows = [
        Row("Q", "A", "B", where="a.jsonl, line 1"),
        Row(turns, "A", "B", where="a.jsonl, line 2"),
        Row("Q", "A", "B<|im_end|>C", where="a.jsonl, line 3"),
    ]
    with pytest.raises(
        RowError, match=r"^a.jsonl, line 2: expected a chat template under which a dialogue begins"
    ):
        encode_rows(rows, tokenizer, 64)
    with pytest.raises(ValueError, match=r"^expected a completion without the EOS token inside") as caught:
        encode_row(rows[2], tokenizer, 64)
    assert not isinstance(caught.value, RowError)
    encoded = encode_rows(rows, tokenizer, 64, on_error="skip")
    assert [pair.where for pair in encoded.entries] == ["a.jsonl, line 1"]
    assert [str(error)[:17] for error in encoded.errors] == ["a.jsonl, line 2: ", "a.jsonl, line 3: "]
    assert encoded.summary() == "Left out of 3 rows: 2 with an error."


@pytest.mark.parametrize("max_length", [7, 0, -1, 8.0, True, "9"])
def test_max_length(max_length: int) -> None:
    for call in (
        lambda: encode_row(Row("Q", "A", "B"), BYTES, max_length),
        lambda: encode_rows([], BYTES, max_length),
    ):
        with pytest.raises(
            ValueError, match=r"expected max_length to be an integer from 8, got .*; choose how many"
        ):
            call()


def test_on_error() -> None:
    with pytest.raises(ValueError, match="expected on_error 'raise' or 'skip', got 'warn'"):
        encode_rows([], BYTES, 8, on_error="warn")  # type: ignore[arg-type]
