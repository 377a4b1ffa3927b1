"""Examples -> token ids of bounded length."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from dpo_wrapper.data.errors import ExampleError, OnError, check_on_error, collect_errors
from dpo_wrapper.data.examples import Example, TokenIds, TokenizedExample, TokenizedExamples
from dpo_wrapper.data.rows.messages import Message, answer_turns
from dpo_wrapper.data.tokens.encoded import EncodedExample, Score
from dpo_wrapper.data.tokens.options import OnLong, TokenizeOptions
from dpo_wrapper.data.tokens.tokenizers import Tokenizer
from dpo_wrapper.data.tokens.truncate import cut_completions, cut_dialogue, cut_prompt, split_text


@dataclass(frozen=True)
class TokenizedRow:
    """What an example became.

    Attributes:
        examples: one; several of a text that is too long; none if the example teaches nothing.
        refusal: why there are none.
        counts: what `TokenizedExamples` counts, by the names of its attributes.
    """

    examples: tuple[TokenizedExample, ...]
    refusal: str | None = None
    counts: Mapping[str, int] = field(default_factory=dict)


def tokenize_examples(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    max_length: int,
    *,
    max_prompt_length: int | None = None,
    on_long: OnLong = "cut",
    score: Score | None = None,
    as_chat: bool | None = None,
    allow_empty: bool = False,
    on_error: OnError = "raise",
) -> TokenizedExamples:
    """Tokenize examples, leave out those that teach nothing, and count what happened.

    Args:
        examples: of any type.
        tokenizer: such as `ByteTokenizer()`.
        max_length, max_prompt_length, on_long, score, as_chat, allow_empty: as in `TokenizeOptions`.
        on_error: 'raise' raises the tokenizer's first error as an `ExampleError`, which names the example's
            place; 'skip' leaves such examples out and keeps their errors.

    Raises:
        ValueError: an option that cannot be, the tokenizer refuses a text, or a sequence is too long where
            `on_long` is 'error'.
    """
    options = TokenizeOptions(
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        on_long=on_long,
        score=score,
        as_chat=as_chat,
        allow_empty=allow_empty,
    )
    check_on_error(on_error)
    result = TokenizedExamples([])
    counts: Counter[str] = Counter()
    for number, example in enumerate(examples):
        with collect_errors(result.errors, on_error, example.source):
            row = tokenize_row(example, tokenizer, options)
            result.examples.extend(row.examples)
            result.origins.extend([number] * len(row.examples))
            counts.update(row.counts)
    return TokenizedExamples(
        result.examples, errors=result.errors, origins=result.origins, **dict[str, int](counts)
    )


def tokenize_row(example: Example, tokenizer: Tokenizer, options: TokenizeOptions) -> TokenizedRow:
    """The tokens of an example.

    A prompt that is longer than `max_prompt_length` is cut: a dialogue as `cut_dialogue` does, plain text at
    its front (BOS stays). Where prompt and completion are longer than `max_length`, the prompt is cut to what
    the completions leave, or to a quarter of `max_length`, alike for all; then completions lose their ends. A
    completion that is cut has no EOS: it did not end there. A text without a prompt loses nothing, but
    becomes several examples.

    Raises:
        ValueError: the tokenizer refuses a text, a completion is empty, or the example is too long where
            `on_long` is 'error'.
    """
    if is_text(example):
        return _tokenize_text(example, tokenizer, options)
    if not options.allow_empty:
        check_has_text(example)
    row = fit_row(example, tokenizer, options)
    for tokenized in row.examples:
        completions = tokenized.completions
        if len(completions) > 1 and all(ids == completions[0] for ids in completions):
            differ = any(completion != example.completions[0] for completion in example.completions)
            if differ and row.counts["num_truncated_completions"]:
                problem = f"the completions differ only behind the maximum length of {options.max_length:,}"
                return TokenizedRow((), f"{problem}: raise --max-length", {"num_identical_cut": 1})
            return TokenizedRow((), "all completions are the same tokens", {"num_identical": 1})
        if count_scored(tokenized) < min(2, len(completions)):
            return TokenizedRow((), "nothing to score", {"num_unscored": 1})
    return row


def check_has_text(example: Example) -> None:
    """ExampleError if a completion has no text and calls no tool: its end would be all that is learned."""
    count = len(example.completions)
    for number, completion in enumerate(example.completions):
        turns = answer_turns(completion)
        if any(turn.text.strip() or turn.needs_template for turn in turns if turn.role == "assistant"):
            continue
        side = ("chosen ", "rejected ")[number] if count == 2 else ""
        which = f"completion {number + 1} of {count}" if count > 2 else f"the {side}completion"
        problem = f"{which} should have text, but it is empty"
        raise ExampleError(
            f"{problem}: leave such rows out (--on-bad-row skip), or allow them (--allow-empty)."
        )


def fit_row(example: Example, tokenizer: Tokenizer, options: TokenizeOptions) -> TokenizedRow:
    """The tokens of a prompt with its completions, whatever they teach."""
    max_length = options.max_length
    dialogue = as_dialogue(example, tokenizer, options.as_chat)
    score = options.score or choose_score(dialogue)
    whole = tokenizer.encode_example(dialogue.prompt, dialogue.completions, dialogue.tools, score)

    def shorten(encoded: EncodedExample, length: int) -> EncodedExample:
        if len(encoded.prompt) > length and not isinstance(dialogue.prompt, str):
            prompt = cut_dialogue(dialogue.prompt, dialogue.tools, length, tokenizer)
            encoded = tokenizer.encode_example(prompt, dialogue.completions, dialogue.tools, score)
        return cut_prompt(encoded, length, tokenizer)

    encoded = whole if options.max_prompt_length is None else shorten(whole, options.max_prompt_length)
    longest = max(map(len, encoded.completions))
    num_truncated = 0
    if len(encoded.prompt) + longest > max_length:
        if (refusal := refuse_long(len(encoded.prompt) + longest, options)) is not None:
            return refusal
        encoded = shorten(encoded, max(max_length - longest, max_length // 4))
        free = max_length - len(encoded.prompt)
        num_truncated = sum(len(ids) > free for ids in encoded.completions)
        encoded = cut_completions(encoded, free, tokenizer)
    is_shortened = len(encoded.prompt) < len(whole.prompt)
    counts = {
        "num_shortened_prompts": is_shortened,
        "num_truncated_completions": num_truncated,
        "num_continued": encoded.is_continued,
        "num_cut": encoded.is_cut,
        "num_as_chat": dialogue is not example,
        "num_template_text": encoded.is_template_text,
    }
    return TokenizedRow((make_example(example, encoded, is_shortened or num_truncated > 0),), counts=counts)


def _tokenize_text(example: Example, tokenizer: Tokenizer, options: TokenizeOptions) -> TokenizedRow:
    encoded = tokenizer.encode_text(str(example.completions[0]), example.loss_masking_spans)
    num_tokens = len(encoded.completions[0])
    length = len(encoded.prompt) + num_tokens
    if length > options.max_length and (refusal := refuse_long(length, options)) is not None:
        return refusal
    parts = split_text(encoded, options.max_length, tokenizer)
    taught = [part for part in parts if num_tokens > 1 and count_scored(part)]  # one is an EOS alone
    if not taught:
        return TokenizedRow((), "nothing to score", {"num_unscored": 1})
    examples = tuple(make_example(example, part, len(parts) > 1) for part in taught)
    return TokenizedRow(examples, counts={"num_split": len(parts) > 1})


def refuse_long(length: int, options: TokenizeOptions) -> TokenizedRow | None:
    """The row without examples if such a length is left out; None if it is cut; ValueError otherwise."""
    problem = f"{length:,} tokens, more than {options.max_length:,}"
    if options.on_long == "drop":
        return TokenizedRow((), problem, {"num_dropped": 1})
    if options.on_long == "error":
        remedy = "raise --max-length, or cut or leave out such rows by --on-long cut or drop"
        raise ValueError(
            f"a row should have at most {options.max_length:,} tokens, but it has {length:,}: {remedy}."
        )
    return None


def is_text(example: Example) -> bool:
    """Whether the example is a text without a prompt, which is tokenized as it stands."""
    is_single = len(example.completions) == 1 and example.label is None
    return is_single and example.prompt == "" and isinstance(example.completions[0], str)


def choose_score(example: Example) -> Score:
    """The turns that are scored by default: all of the assistant's where they are imitated."""
    if len(example.completions) > 1 or example.label is not None or isinstance(example.prompt, str):
        return "last"
    is_one_answer = isinstance(example.completions[0], str) or len(example.completions[0]) == 1
    answered = any(turn.role == "assistant" for turn in example.prompt)
    return "last" if is_one_answer and not answered else "assistant"


def as_dialogue(example: Example, tokenizer: Tokenizer, as_chat: bool | None) -> Example:
    """The example with a plain prompt as the user's turn, where `as_chat` or the tokenizer says so."""
    if not isinstance(example.prompt, str):
        return example
    if as_chat is None:
        has_user = bool(example.prompt)  # pairs without a prompt answer no one
        is_usual = has_user and tokenizer.has_chat_template and not tokenizer.is_template_text(example.prompt)
    if not (is_usual if as_chat is None else as_chat):
        if example.tools:
            raise ValueError(
                "tools should belong to a dialogue, but the prompt is plain text: write it as messages, or "
                "ignore the column with --columns tools=."
            )
        return example
    return replace(example, prompt=(Message("user", example.prompt),))


def count_scored(example: EncodedExample | TokenizedExample) -> int:
    """The number of completions with a scored token; the first token of a sequence is none."""
    if example.scored is not None:
        return sum(any(mask[1:]) for mask in example.scored)
    first = 0 if example.prompt else 1
    return sum(len(ids) > first for ids in example.completions)


def make_example(example: Example, encoded: EncodedExample, is_cut: bool) -> TokenizedExample:
    """The tokenized example with the columns of the example."""
    return TokenizedExample(
        _share_ints(encoded.prompt),
        tuple(map(_share_ints, encoded.completions)),
        example.label,
        example.weight,
        example.margin,
        example.source,
        scored=None if encoded.scored is None else tuple(map(tuple, encoded.scored)),
        ranks=example.ranks,
        is_document=example.is_document,
        is_cut=is_cut,
    )


class _SharedInts(dict[int, int]):
    def __missing__(self, index: int) -> int:
        return self.setdefault(index, index)


_INTS = _SharedInts()


def _share_ints(ids: Iterable[int]) -> TokenIds:
    """The ids, of which equal ones are one object: 8 bytes a token instead of 36 with an int of its own."""
    return tuple(map(_INTS.__getitem__, ids))
