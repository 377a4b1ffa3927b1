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


def mask_characters(text: str, spans: Iterable[tuple[int, int]]) -> bytearray:
    """1 for each character of the text that lies in one of the spans, else 0."""
    masked = bytearray(len(text))
    for start, end in spans:
        masked[start:end] = b"\1" * (end - start)
    return masked
