"""Examples to tokens of bounded length: what is cut, in which order, and what is left out."""

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
from dpo_wrapper.data.tokens.encode import check_has_text, fit_row, tokenize_row
from dpo_wrapper.data.tokens.options import TokenizeOptions
from helpers import tokenizers as tiny
from helpers.datasets import tokenize_example
from helpers.tokenizers import NoBos

BYTES = ByteTokenizer()
BOS, EOS = 256, 257


@pytest.mark.pitfall(7, 9)
@given(
    st.text(max_size=60),
    st.text(max_size=60),
    st.text(max_size=60),
    st.integers(8, 80),
    st.sampled_from([BYTES, NoBos()]),
)
def test_truncation(
    prompt: str, chosen: str, rejected: str, max_length: int, tokenizer: ByteTokenizer
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
    tokenized = tokenize_examples(examples, NoBos(), 8, allow_empty=True)
    assert tokenized.examples == [TokenizedExample((81,), ((65, EOS), (66, EOS)))]
    assert (tokenized.num_identical, tokenized.num_identical_cut, tokenized.num_unscored) == (1, 1, 1)
    assert tokenized.summary() == (
        "Left out of 4 examples: 1 with the same tokens in every completion, 1 that differ only behind the "
        "maximum length, which should be larger, 1 with nothing to score."
    )
    assert len(tokenize_examples(examples[3:], BYTES, 8, allow_empty=True).examples) == 1


@pytest.mark.pitfall(8)
def test_an_invalid_pair_among_them_changes_nothing() -> None:
    examples = [Example("Q", ("A", "B")), Example("R", ("C", "D"))]
    with_empty = [examples[0], Example("Q", ("", "")), examples[1]]
    tokenized = tokenize_examples(with_empty, BYTES, 8, allow_empty=True)
    assert tokenized.examples == tokenize_examples(examples, BYTES, 8).examples


EMPTY = {
    "the chosen completion": Example("Q", ("", "B")),
    "the rejected completion": Example("Q", ("A", " \n")),
    "completion 3 of 3": Example("Q", ("A", "B", "")),
    "the completion": Example("Q", ("",), label=False),
}


@pytest.mark.parametrize("which", EMPTY)
def test_an_empty_completion_is_refused_unless_allowed(which: str) -> None:
    with pytest.raises(ValueError, match=f"{which} should have text, but it is empty: leave such rows out"):
        tokenize_examples([EMPTY[which]], BYTES, 8)
    skipped = tokenize_examples([EMPTY[which], Example("Q", ("A", "B"))], BYTES, 8, on_error="skip")
    assert (len(skipped.examples), len(skipped.errors)) == (1, 1)
    assert len(tokenize_examples([EMPTY[which]], BYTES, 8, allow_empty=True).examples) == 1


def test_an_answer_that_only_calls_a_tool_is_not_empty() -> None:
    call = Message("assistant", None, {"tool_calls": [{"type": "function", "function": {"name": "f"}}]})
    check_has_text(Example((Message("user", "q"),), ((call,), (Message("assistant", "a"),))))


def test_counts_and_summary() -> None:
    examples = [
        Example("Q", ("A", "B")),
        Example("Q" * 30, ("A", "B")),
        Example("Q" * 30, ("A" * 30, "B" * 30)),
    ]
    tokenized = tokenize_examples(examples, BYTES, 16)
    assert (tokenized.num_shortened_prompts, tokenized.num_truncated_completions) == (2, 2)
    assert tokenized.summary() == "Cut to the maximum length: 2 prompts (earliest text), 2 completions (end)."
    assert tokenize_examples(examples[:1], BYTES, 16).summary() == ""
    assert TokenizedExamples(tokenized.examples, 1000, 0, 1, 0, [ExampleError("x")]).summary() == (
        "Left out of 1,004 examples: 1 with an error, 1,000 with the same tokens in every completion; "
        "cut to the maximum length: 1 prompt (earliest text)."
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
        "in 1 example the chat template makes a plain prompt the user's turn."
    )


@pytest.mark.parametrize("max_length", [7, 0, -1, 8.0, True, "9"])
def test_max_length(max_length: int) -> None:
    with pytest.raises(
        ValueError, match=r"max_length should be an integer of at least 8, but it is .*: choose how many"
    ):
        tokenize_examples([], BYTES, max_length)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_prompt_length": 0}, "max_prompt_length should be an integer from 1 to 31, below max_length"),
        ({"max_prompt_length": 32}, "max_prompt_length should be an integer from 1 to 31, below max_length"),
        ({"max_prompt_length": 2.0}, "below max_length, but it is 2.0: choose"),
        ({"on_long": "split"}, "on_long should be 'cut', 'drop' or 'error', but it is 'split': choose"),
        ({"score": "all"}, "score should be 'last' or 'assistant', but it is 'all': choose"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        tokenize_examples([], BYTES, 32, **options)


def test_prompts_are_cut_first_where_they_have_a_maximum() -> None:
    pair = Example("0123456789", ("abc", "d"))
    tokenized = tokenize_examples([pair], BYTES, 16, max_prompt_length=4)
    (example,) = tokenized.examples
    assert example.prompt == (BOS, *b"789") and example.completions == ((*b"abc", EOS), (*b"d", EOS))
    assert example.is_cut and tokenized.num_shortened_prompts == 1
    (example,) = tokenize_examples([pair], NoBos(), 16, max_prompt_length=4).examples
    assert example.prompt == tuple(b"6789")
    (example,) = tokenize_examples([pair], BYTES, 16, max_prompt_length=1).examples
    assert example.prompt == (BOS,)
    (example,) = tokenize_examples([pair], BYTES, 15, max_prompt_length=11).examples
    assert len(example.prompt) == 11 and not example.is_cut
    long = Example("0123456789", ("abcdefgh", "d"))
    (example,) = tokenize_examples([long], BYTES, 8, max_prompt_length=4).examples  # and then to fit
    assert example.prompt == (BOS, *b"9") and example.completions[0] == tuple(b"abcdef")


def test_what_is_too_long_is_cut_dropped_or_refused() -> None:
    short, long = Example("12", ("ab", "c"), source="short"), Example("1234", ("abcd", "e"), source="long")
    cut = tokenize_examples([short, long], BYTES, 8)
    assert [(one.source, one.is_cut) for one in cut.examples] == [("short", False), ("long", True)]
    dropped = tokenize_examples([short, long], BYTES, 8, on_long="drop")
    assert dropped == TokenizedExamples(cut.examples[:1], num_dropped=1)
    assert dropped.summary() == "Left out of 2 examples: 1 longer than the maximum."
    options = TokenizeOptions(max_length=8, on_long="drop")
    assert tokenize_row(long, BYTES, options).refusal == "10 tokens, more than 8"
    problem = "long: a row should have at most 8 tokens, but it has 10: raise --max-length, or cut or"
    with pytest.raises(ExampleError, match=problem):
        tokenize_examples([short, long], BYTES, 8, on_long="error")
    refused = tokenize_examples([short, long], BYTES, 8, on_long="error", on_error="skip")
    assert refused.examples == cut.examples[:1] and len(refused.errors) == 1
    assert not tokenize_examples([long], BYTES, 8, on_long="drop", max_prompt_length=3).num_dropped


def test_turns_that_are_imitated_are_scored() -> None:
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    (imitated,) = tokenize_examples([Example(turns, ("d",))], BYTES, 64).examples
    (compared,) = tokenize_examples([Example(turns, ("d", "e"))], BYTES, 64).examples
    ids = zip(imitated.prompt + imitated.completions[0], imitated.scored_masks()[0], strict=True)
    assert bytes(id_ for id_, is_scored in ids if is_scored and id_ < 256) == b"bd"
    assert compared.scored is None
    for label in (True, False):  # labelled completions are preferences
        (labelled,) = tokenize_examples([Example(turns, ("d",), label)], BYTES, 64).examples
        assert labelled.scored is None
    (last,) = tokenize_examples([Example(turns, ("d",))], BYTES, 64, score="last").examples
    assert last.scored is None and last.completions == imitated.completions
    (single,) = tokenize_examples([Example(turns[:1], ("b",))], BYTES, 64).examples
    (every,) = tokenize_examples([Example(turns[:1], ("b",))], BYTES, 64, score="assistant").examples
    assert single.scored is None and single.scored_masks() == every.scored_masks()


def test_columns_reach_the_tokens() -> None:
    ranked = Example("q", ("a", "b", "c"), weight=2.0, source="s", ranks=(0.0, 1.0, 1.0))
    (example,) = tokenize_examples([ranked], BYTES, 64).examples
    assert (example.weight, example.source, example.ranks) == (2.0, "s", (0.0, 1.0, 1.0))
    row = tokenize_row(Example("q", ("a", "a")), BYTES, TokenizeOptions(max_length=8))
    assert row.refusal == "all completions are the same tokens" and not row.examples
    row = tokenize_row(Example("q", ("a" * 9, "a" * 8 + "b")), BYTES, TokenizeOptions(max_length=8))
    problem = "the completions differ only behind the maximum length of 8: raise --max-length"
    assert row.refusal == problem and not row.examples
    shortest = Example("q" * 9, ("",), source="s")  # of which nothing is left but the prompt and EOS
    assert fit_row(shortest, BYTES, TokenizeOptions(max_length=8)).examples[0].completions == ((EOS,),)


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
