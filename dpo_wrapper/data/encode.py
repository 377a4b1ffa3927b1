"""Examples -> token ids of bounded length."""

from collections.abc import Iterable

from dpo_wrapper.data.errors import ExampleError, OnError, check_on_error, collect_errors
from dpo_wrapper.data.examples import Example, TokenIds, TokenizedExample, TokenizedExamples
from dpo_wrapper.data.tokenizers import Tokenizer


def tokenize_examples(
    examples: Iterable[Example], tokenizer: Tokenizer, max_length: int, *, on_error: OnError = "raise"
) -> TokenizedExamples:
    """Tokenize examples, leave out those that teach nothing, and count what happened.

    Args:
        examples: pairs, ranked lists and completions with a label.
        tokenizer: such as `ByteTokenizer()`.
        max_length: number of tokens that a prompt with one completion may have, at least 8.
        on_error: 'raise' raises the tokenizer's first error as an `ExampleError`, which names the example's
            place; 'skip' leaves such examples out and keeps their errors.

    Raises:
        ValueError: `max_length` is below 8, or the tokenizer refuses a text.
    """
    if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 8:
        problem = f"max_length should be an integer of at least 8, but it is {max_length!r}"
        raise ValueError(f"{problem}: choose how many tokens prompt and completion may have together.")
    check_on_error(on_error)
    kept: list[TokenizedExample] = []
    errors: list[ExampleError] = []
    num_identical = num_unscored = num_shortened = num_truncated = 0
    for example in examples:
        with collect_errors(errors, on_error, example.source):
            tokenized, is_shortened, truncated = tokenize_example(example, tokenizer, max_length)
            completions = tokenized.completions
            # The first token of a sequence is never scored.
            num_scored = sum(len(completion) > (0 if tokenized.prompt else 1) for completion in completions)
            if len(completions) > 1 and len(set(completions)) == 1:
                num_identical += 1
            elif num_scored < min(2, len(completions)):
                num_unscored += 1
            else:
                kept.append(tokenized)
                num_shortened += is_shortened
                num_truncated += truncated
    return TokenizedExamples(kept, num_identical, num_unscored, num_shortened, num_truncated, errors)


def tokenize_example(
    example: Example, tokenizer: Tokenizer, max_length: int
) -> tuple[TokenizedExample, bool, int]:
    """The tokenized example, whether its prompt was shortened, and how many completions were truncated.

    A prompt that is too long loses tokens from its front first (BOS stays), down to a quarter of
    `max_length`, alike for all completions; then completions lose their ends. A completion that is cut has no
    EOS: it did not end there.
    """
    prompt = tokenizer.prompt_ids(example.prompt)
    completions = [tokenizer.completion_ids(example.prompt, text) for text in example.completions]
    free = max_length - max(map(len, completions))
    prompt_length = min(len(prompt), max(free, max_length // 4))
    last_tokens = prompt[-prompt_length:]
    if prompt and prompt[0] == tokenizer.bos_id:
        last_tokens[0] = tokenizer.bos_id
    cut = tuple(_share_ints(ids[: max_length - prompt_length]) for ids in completions)
    columns = (example.label, example.weight, example.margin, example.source)
    truncated = sum(len(ids) > max_length - prompt_length for ids in completions)
    return TokenizedExample(_share_ints(last_tokens), cut, *columns), prompt_length < len(prompt), truncated


_INTS: dict[int, int] = {}


def _share_ints(ids: Iterable[int]) -> TokenIds:
    """The ids, of which equal ones are one object: 8 bytes a token instead of 36 with an int of its own."""
    return tuple(_INTS.setdefault(index, index) for index in ids)
