"""What a tokenizer makes of a prompt with its completions."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Score = Literal["last", "assistant"]
"""Which turns of a dialogue are scored: the answer to the prompt, or every turn of the assistant."""


@dataclass(frozen=True)
class EncodedExample:
    """The token ids of a prompt and of the completions that continue it.

    Attributes:
        prompt: Int[k], the same for all completions.
        completions: one Int[n] each.
        scored: for each completion whether a token of prompt and completion together is scored, Bool[k + n];
            None if these are all tokens of the completions.
        is_continued: whether a token of the whole text would span the border, so that the completion was
            tokenized as what follows the prompt's own ids.
        is_cut: whether the prompt ends before what a chat template writes at inference to open an answer.
        is_template_text: whether the prompt is plain text that a chat template has written already.
    """

    prompt: list[int]
    completions: list[list[int]]
    scored: list[list[bool]] | None = None
    is_continued: bool = False
    is_cut: bool = False
    is_template_text: bool = False


def mask_tokens(
    length: int, tokens: Iterable[tuple[int, int]], masked_spans: Iterable[tuple[int, int]]
) -> list[bool]:
    """For each token of a text, and for an EOS behind it, whether it has no character in a masked span.

    `tokens` are the ranges [start, end) of each in the text of `length` characters. The EOS counts as part of
    the last character.
    """
    masked = bytearray(length)
    for start, end in masked_spans:
        masked[start:end] = b"\1" * (end - start)
    return [1 not in masked[start:end] for start, end in tokens] + [1 not in masked[-1:]]
