"""Examples to tokens of bounded length: what is cut, in which order, and what is left out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_wrapper.data import (
    ByteTokenizer,
    Example,
    ExampleError,
    HuggingFaceTokenizer,
    Message,
    TokenizedExample,
    TokenizedExamples,
    tokenize_examples,
)
from helpers import tokenizers as tiny
from helpers.datasets import tokenize_example

BYTES = ByteTokenizer()
BOS, EOS = 256, 257


class NoBos(ByteTokenizer):
    """Bytes without a BOS; the prompt '' has no token at all."""

    bos_id = None  # type: ignore[assignment]

    def encode_prompt(self, prompt: str | tuple[Message, ...], tools: Sequence[Any] = ()) -> list[int]:
        return super().encode_prompt(prompt, tools)[1:]


_prompts = st.text(max_size=60) | st.lists(
    st.builds(Message, st.just("user"), st.text(max_size=20)), min_size=1
).map(tuple)


@pytest.mark.pitfall(7, 9)
@given(
    _prompts,
    st.text(max_size=60),
    st.text(max_size=60),
    st.integers(8, 80),
    st.sampled_from([BYTES, NoBos()]),
)
def test_truncation(
    prompt: str | tuple[Message, ...], chosen: str, rejected: str, max_length: int, tokenizer: ByteTokenizer
) -> None:
    example = Example(prompt, (chosen, rejected), weight=2.0, margin=0.5, source="here")
    pair = tokenize_example(example, tokenizer, max_length)
    whole = tokenizer.encode_prompt(prompt)
    sides = [tiny.encode_completion(tokenizer, prompt, text) for text in (chosen, rejected)]
    cut = [pair.chosen, pair.rejected]
    assert (pair.source, pair.weight, pair.margin, pair.label) == ("here", 2.0, 0.5, None)
    assert all(len(pair.prompt) + len(side) <= max_length for side in cut)
    # Completions lose their end only, and an EOS is never put back.
    assert all(list(side) == full[: len(side)] for side, full in zip(cut, sides, strict=True))
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
    # No character is cut in two.
    for side, text in zip(cut, (chosen, rejected), strict=True):
        assert text.startswith(tokenizer.decode(side))


def test_truncation_by_hand() -> None:
    example = Example("abcdef", ("xyz", "w"))  # BOS and 6 bytes; 4 and 2 tokens
    assert tokenize_example(example, BYTES, 11) == TokenizedExample(
        (BOS, *b"abcdef"), ((*b"xyz", EOS), (*b"w", EOS))
    )
    assert tokenize_example(example, BYTES, 10) == TokenizedExample(
        (BOS, *b"bcdef"), ((*b"xyz", EOS), (*b"w", EOS))
    )
    assert tokenize_example(example, BYTES, 8) == TokenizedExample(
        (BOS, *b"def"), ((*b"xyz", EOS), (*b"w", EOS))
    )
    example = Example("abcdef", ("0123456789", "w"))
    assert tokenize_example(example, BYTES, 8) == TokenizedExample(
        (BOS, *b"f"), (tuple(b"012345"), (*b"w", EOS))
    )
    assert tokenize_example(example, BYTES, 12) == TokenizedExample(
        (BOS, *b"ef"), (tuple(b"012345678"), (*b"w", EOS))
    )
    assert tokenize_example(Example("a", ("0123456789", "w")), BYTES, 8).prompt == (BOS, *b"a")


@pytest.mark.pitfall(11)
def test_an_eos_that_is_cut_off_is_not_trained() -> None:
    pair = tokenize_example(Example("Q", ("0123456789", "01")), BYTES, 8)
    assert EOS not in pair.chosen and pair.rejected.count(EOS) == 1


@pytest.mark.pitfall(7)
def test_pairs_that_teach_nothing_are_counted_and_left_out() -> None:
    examples = [
        Example("Q", ("A", "B")),
        Example("Q", ("A", "A")),
        Example("Q", ("0123456789 one", "0123456789 two")),  # the same once both are cut
        # without BOS the EOS is the first token of its sequence, and nothing predicts it
        Example("", ("", "B")),
    ]
    tokenized = tokenize_examples(examples, NoBos(), 8)
    assert tokenized.examples == [TokenizedExample((81,), ((65, EOS), (66, EOS)))]
    assert (tokenized.num_identical, tokenized.num_unscored, tokenized.errors) == (2, 1, [])
    assert tokenized.summary() == (
        "Left out of 4 examples: 2 with the same tokens in every completion, 1 with nothing to score."
    )
    assert len(tokenize_examples(examples[3:], BYTES, 8).examples) == 1


@pytest.mark.pitfall(8)
def test_an_invalid_pair_among_them_changes_nothing() -> None:
    examples = [Example("Q", ("A", "B")), Example("R", ("C", "D"))]
    assert (
        tokenize_examples([examples[0], Example("Q", ("", "")), examples[1]], BYTES, 8).examples
        == tokenize_examples(examples, BYTES, 8).examples
    )


def test_counts_and_summary() -> None:
    examples = [
        Example("Q", ("A", "B")),
        Example("Q" * 30, ("A", "B")),
        Example("Q" * 30, ("A" * 30, "B" * 30)),
    ]
    tokenized = tokenize_examples(examples, BYTES, 16)
    assert (tokenized.num_shortened_prompts, tokenized.num_truncated_completions) == (2, 2)
    assert tokenized.summary() == "Cut to fit: 2 prompts at the front, 2 completions at the end."
    assert tokenize_examples(examples[:1], BYTES, 16).summary() == ""
    assert TokenizedExamples(tokenized.examples, 1000, 0, 1, 0, [ExampleError("x")]).summary() == (
        "Left out of 1,004 examples: 1 with an error, 1,000 with the same tokens in every completion; "
        "cut to fit: 1 prompt at the front."
    )


@pytest.mark.pitfall(10)
def test_tokenizer_errors_name_the_row(tmp_path: Path) -> None:
    tiny.save_tokenizer(tmp_path, eos="<|im_end|>", template=tiny.DROPS_THOUGHT)
    tokenizer = HuggingFaceTokenizer.load(tmp_path)
    turns = (Message("user", "Hello"),)
    examples = [
        Example("Q", ("A", "B"), source="a.jsonl, line 1"),
        Example(turns, ("hm</think>A", "B"), source="a.jsonl, line 2"),
        Example(
            "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
            ("A", "B<|im_end|>C"),
            source="a.jsonl, line 3",
        ),
    ]
    with pytest.raises(
        ExampleError, match=r"^a.jsonl, line 2: the chat template should keep the answer whole"
    ):
        tokenize_examples(examples, tokenizer, 64)
    with pytest.raises(
        ValueError, match=r"^the completion should not hold an end of turn, but one stands inside"
    ) as caught:
        tokenize_example(examples[2], tokenizer, 64)
    assert not isinstance(caught.value, ExampleError)
    tokenized = tokenize_examples(examples, tokenizer, 64, on_error="skip")
    assert [pair.source for pair in tokenized.examples] == ["a.jsonl, line 1"]
    assert [str(error)[:17] for error in tokenized.errors] == ["a.jsonl, line 2: ", "a.jsonl, line 3: "]
    assert tokenized.summary() == (
        "Left out of 3 examples: 2 with an error; "
        "in 1 examples a plain prompt is the user's turn of a dialogue."
    )


@pytest.mark.parametrize("max_length", [7, 0, -1, 8.0, True, "9"])
def test_max_length(max_length: int) -> None:
    with pytest.raises(
        ValueError, match=r"max_length should be an integer of at least 8, but it is .*: choose how many"
    ):
        tokenize_examples([], BYTES, max_length)


def test_on_error() -> None:
    with pytest.raises(ValueError, match="on_error should be 'raise' or 'skip', but it is 'warn'"):
        tokenize_examples([], BYTES, 8, on_error="warn")  # type: ignore[arg-type]


class ManyIds(ByteTokenizer):
    """Ids so large that Python makes each one anew."""

    def completion_ids(self, prompt: str | tuple[Message, ...], completion: str) -> list[int]:
        return [1000 + index for index in super().completion_ids(prompt, completion)]


def test_equal_token_ids_are_one_object() -> None:
    examples = [Example("p", ("abcabc", "cba")), Example("q", ("bbb", "a"))]
    tokenized = tokenize_examples(examples, ManyIds(), 64).examples
    ids = [index for example in tokenized for completion in example.completions for index in completion]
    assert len(ids) > 12 and len({id(index) for index in ids}) == len(set(ids)) == 4
