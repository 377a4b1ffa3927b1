"""`dpo-wrapper prepare --preview N`: examples as they will be trained, and counts of what was read."""

import sys
from collections.abc import Iterator, Sequence
from datetime import date
from itertools import groupby
from typing import TypeVar

from dpo_wrapper.data.convert import read_and_convert
from dpo_wrapper.data.examples import Example, TokenizedExample, TokenizedExamples
from dpo_wrapper.data.prepare.config import PrepareConfig
from dpo_wrapper.data.readers import ReadExamples
from dpo_wrapper.data.tokens.encode import tokenize_examples
from dpo_wrapper.data.tokens.tokenizers import Tokenizer

GREEN, RESET = "\x1b[32m", "\x1b[0m"


def preview_data(config: PrepareConfig) -> None:
    """Print the first examples of the data as they will be trained, and what was read.

    Raises:
        ValueError, ImportError: one sentence about the setting or the row that is wrong.
    """
    tokenizer = config.load_tokenizer(date.today())
    read = read_and_convert(config.data, config)
    tokenized = tokenize_examples(
        read.examples, tokenizer, on_error=config.on_error, **config.tokenize_options
    )
    print_examples(tokenized.examples, 3 if config.preview is None else config.preview, tokenizer)
    print(format_counts(read, tokenized))


def print_examples(examples: Sequence[TokenizedExample], count: int, tokenizer: Tokenizer) -> None:
    """Print the first examples, in colour on a terminal."""
    for number in range(min(count, len(examples))):
        print(f"── {number + 1} of {len(examples):,}: {examples[number].source} ──")
        print(format_example(examples[number], tokenizer, sys.stdout.isatty()) + "\n")


def format_example(example: TokenizedExample, tokenizer: Tokenizer, is_coloured: bool = False) -> str:
    """A tokenized example as text with its special tokens, scored parts between ⟦ and ⟧."""
    count = len(example.prompt)
    masks = example.scored_masks()
    lines = [("prompt", mark_scored(tokenizer, example.prompt, masks[0][:count], (), is_coloured))]
    for name, completion, mask in zip(name_completions(example), example.completions, masks, strict=True):
        lines.append((name, mark_scored(tokenizer, completion, mask[count:], example.prompt, is_coloured)))
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:{width}}" + text.replace("\n", "\n" + " " * width) for name, text in lines)


def name_completions(example: TokenizedExample) -> list[str]:
    """What each completion is: chosen or rejected, its rank, its label."""
    if example.label is not None:
        return ["desirable" if example.label else "undesirable"]
    if len(example.completions) == 1:
        return ["text" if example.is_document else "completion"]
    if len(example.completions) == 2:
        return ["chosen", "rejected"]
    return [f"rank {k}" for k in range(1, len(example.completions) + 1)]


def mark_scored(
    tokenizer: Tokenizer, ids: Sequence[int], scored: Sequence[bool], before: Sequence[int], is_coloured: bool
) -> str:
    """The text of ids that follow others, with brackets around what is scored."""
    opening, closing = (f"{GREEN}⟦", f"⟧{RESET}") if is_coloured else ("⟦", "⟧")
    parts = decode_runs(tokenizer, ids, scored, before)
    return "".join(f"{opening}{text}{closing}" if is_scored else text for text, is_scored in parts)


Key = TypeVar("Key")


def decode_runs(
    tokenizer: Tokenizer, ids: Sequence[int], keys: Sequence[Key], before: Sequence[int]
) -> Iterator[tuple[str, Key]]:
    """The text of each run of ids that have the same key, special tokens included, and the key.

    Args:
        tokenizer: of the ids.
        ids: Int[n], which follow `before`.
        keys: one per id, such as whether it is scored.
        before: Int[k].
    """
    start = 0
    for key, run in groupby(keys):
        end = start + len(list(run))
        # decoded behind what comes before: some tokenizers drop white space at the beginning of a text
        texts = [tokenizer.decode([*before, *ids[:k]], skip_special_tokens=False) for k in (start, end)]
        yield texts[1].removeprefix(texts[0]), key
        start = end


def format_counts(read: ReadExamples, tokenized: TokenizedExamples) -> str:
    """What was read, left out, shortened and not used."""
    forms = ", ".join(f"{count:,} {form}" for form, count in read.forms.most_common())
    duplicates = len(read.examples) - len(set(map(content_of, read.examples)))
    lines = [f"Rows: {read.num_rows:,} read" + (f" ({forms})." if forms else ".")]
    if duplicates:
        lines.append(f"Duplicates: {duplicates:,} rows equal an earlier one.")
    lines += read.notes()
    if tokenized.errors:
        lines.append(
            f"{len(tokenized.errors):,} rows could not be tokenized; the first: {tokenized.errors[0]}"
        )
    lines += [tokenized.summary()] if tokenized.summary() else []
    return "\n".join(lines)


def content_of(example: Example) -> str:
    """What makes two examples equal."""
    return repr((example.prompt, example.completions, example.label))
