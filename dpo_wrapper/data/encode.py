"""Examples -> token ids of bounded length."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from dpo_wrapper.data.encoded import EncodedExample, Score
from dpo_wrapper.data.errors import OnError, check_on_error, collect_errors
from dpo_wrapper.data.examples import Example, TokenIds, TokenizedExample, TokenizedExamples
from dpo_wrapper.data.messages import Message
from dpo_wrapper.data.tokenizers import Tokenizer


def tokenize_examples(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    max_length: int,
    *,
    score: Score = "last",
    as_chat: bool | None = None,
    on_error: OnError = "raise",
) -> TokenizedExamples:
    """Tokenize examples, leave out those that teach nothing, and count what happened.

    Args:
        examples: pairs, ranked lists and completions with a label.
        tokenizer: such as `ByteTokenizer()`.
        max_length: number of tokens that a prompt with one completion may have, at least 8.
        score: the turns that are scored, 'last' or 'assistant'.
        as_chat: whether a plain prompt is the user's turn of a dialogue; by default where the tokenizer has a
            chat template, unless the prompt has been written by one already.
        on_error: 'raise' raises the tokenizer's first error as an `ExampleError`, which names the example's
            place; 'skip' leaves such examples out and keeps their errors.

    Raises:
        ValueError: `max_length` is below 8, or the tokenizer refuses a text.
    """
    if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 8:
        problem = f"max_length should be an integer of at least 8, but it is {max_length!r}"
        raise ValueError(f"{problem}: choose how many tokens prompt and completion may have together.")
    if score not in ("last", "assistant"):
        raise ValueError(f"score should be 'last' or 'assistant', but it is {score!r}: choose one of them.")
    check_on_error(on_error)
    result = TokenizedExamples([])
    counts = dict.fromkeys(COUNTS, 0)
    for example in examples:
        with collect_errors(result.errors, on_error, example.source):
            dialogue = as_dialogue(example, tokenizer, as_chat)
            cut = tokenize_example(dialogue, tokenizer, max_length, score)
            num_scored = sum(map(any, cut.example.scored_masks()))
            completions = cut.example.completions
            if len(completions) > 1 and len(set(completions)) == 1:
                counts["num_identical"] += 1
            elif num_scored < min(2, len(completions)):
                counts["num_unscored"] += 1
            else:
                result.examples.append(cut.example)
                counts["num_shortened_prompts"] += cut.is_shortened
                counts["num_truncated_completions"] += cut.num_truncated
                counts["num_continued"] += cut.encoded.is_continued
                counts["num_cut"] += cut.encoded.is_cut
                counts["num_as_chat"] += dialogue is not example
                counts["num_template_text"] += cut.encoded.is_template_text
    return TokenizedExamples(result.examples, errors=result.errors, **counts)


COUNTS = (
    "num_identical", "num_unscored", "num_shortened_prompts", "num_truncated_completions", "num_continued",
    "num_cut", "num_as_chat", "num_template_text",
)  # fmt: skip


def as_dialogue(example: Example, tokenizer: Tokenizer, as_chat: bool | None) -> Example:
    """The example with a plain prompt as the user's turn, where `as_chat` or the tokenizer says so."""
    if not isinstance(example.prompt, str):
        return example
    is_usual = tokenizer.has_chat_template and not tokenizer.is_template_text(example.prompt)
    is_usual &= bool(example.prompt)  # pairs without a prompt answer no one
    if not (is_usual if as_chat is None else as_chat):
        if example.tools:
            raise ValueError(
                "tools should belong to a dialogue, but the prompt is plain text: write it as messages, or "
                "ignore the column with --columns tools=."
            )
        return example
    return replace(example, prompt=(Message("user", example.prompt),))


@dataclass(frozen=True)
class CutExample:
    """A tokenized example, what the tokenizer said of it, and what was cut to make it fit."""

    example: TokenizedExample
    encoded: EncodedExample
    is_shortened: bool
    num_truncated: int


def tokenize_example(
    example: Example, tokenizer: Tokenizer, max_length: int, score: Score = "last"
) -> CutExample:
    """The tokens of an example.

    A prompt that is too long loses tokens from its front first (BOS stays), down to a quarter of
    `max_length`, alike for all completions; then completions lose their ends. A completion that is cut has no
    EOS: it did not end there.
    """
    encoded = tokenizer.encode_example(example.prompt, example.completions, example.tools, score)
    prompt, completions = encoded.prompt, encoded.completions
    free = max_length - max(map(len, completions))
    prompt_length = min(len(prompt), max(free, max_length // 4))
    lost = len(prompt) - prompt_length
    last_tokens = prompt[lost:]
    if prompt and prompt[0] == tokenizer.bos_id:
        last_tokens[0] = tokenizer.bos_id
    free = max_length - prompt_length
    cut = tuple(_share_ints(ids[: find_end(ids, free, tokenizer)]) for ids in completions)
    lengths = [prompt_length + len(ids) for ids in cut]
    masks = zip(encoded.scored or (), lengths, strict=False)
    scored = tuple(tuple(mask[lost : lost + length]) for mask, length in masks) or None
    columns = (example.label, example.weight, example.margin, example.source)
    tokenized = TokenizedExample(_share_ints(last_tokens), cut, *columns, scored=scored)
    return CutExample(tokenized, encoded, lost > 0, sum(len(ids) > free for ids in completions))


def find_end(ids: list[int], length: int, tokenizer: Tokenizer) -> int:
    """The number of ids to keep of a completion that is cut at `length`: no character is cut in two."""
    for shorter in range(min(4, length)):
        if length >= len(ids) or not tokenizer.decode(ids[: length - shorter]).endswith(REPLACEMENT):
            return length - shorter
    return length  # such a character stands in the text


REPLACEMENT = "\ufffd"
"""What half a character is decoded to."""


_INTS: dict[int, int] = {}


def _share_ints(ids: Iterable[int]) -> TokenIds:
    """The ids, of which equal ones are one object: 8 bytes a token instead of 36 with an int of its own."""
    return tuple(_INTS.setdefault(index, index) for index in ids)
