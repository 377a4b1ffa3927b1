"""What a model says of some prompts, and whether an export of it says the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dpo_wrapper.data.rows.messages import Message
from dpo_wrapper.data.tokens.chat_template import MARK
from dpo_wrapper.data.tokens.hugging_face_tokenizer import HuggingFaceTokenizer
from dpo_wrapper.data.tokens.tokenizers import Tokenizer

Logits = NDArray[np.float32]
"""Float[n, v], the logits after each of n tokens."""

TOLERANCES = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 2e-2, "q8_0": 5e-2, "q4_k_m": 0.2}
"""The largest difference of logits, relative to their spread, that the rounding of weights explains, by how
they are stored. Wrong orders of rows, scales and positions are at 0.1 and more in float32."""


class ExportError(Exception):
    """An export does not compute what the model does; one sentence."""


class UnreadableError(Exception):
    """A program cannot load an export that others can; one sentence."""


@dataclass(frozen=True)
class PromptOutput:
    """What a model says of one prompt.

    Attributes:
        prompt: the text, as the user's turn of a dialogue or as it is.
        prompt_ids: its tokens.
        answer_ids: Int[k], the most likely tokens after it, each given those before it.
        logits: Float[k, v], from which these were taken.
        text: what a program that has a tokenizer of its own should read as these tokens; None where the
            tokens have no text.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    logits: Logits
    text: str | None = None

    @property
    def ids(self) -> list[int]:
        """The prompt and its answer without the last token, which is no input."""
        return [*self.prompt_ids, *self.answer_ids[:-1]]


class Reader(Protocol):
    """An export as a program has loaded it, which computes in float32."""

    name: str

    def compute_logits(self, ids: Sequence[int]) -> Logits:
        """The logits after each token of a sequence, Float[n, v]; v may be larger than the model's own."""

    def tokenize(self, text: str) -> list[int] | None:
        """The ids of a text with special tokens in it; None where the program has no tokenizer."""

    def close(self) -> None:
        """Free the memory."""


@dataclass(frozen=True)
class Agreement:
    """How far an export and the model are apart.

    Attributes:
        reader: the program that has read the export.
        difference: the largest difference of two logits, relative to the spread of the model's.
        tolerance: the largest such difference that is rounding.
        num_equal, num_ties, num_tokens: tokens that are the most likely ones for both; those that are so for
            one and as good as that for the other, within the tolerance; and all that were compared.
    """

    reader: str
    difference: float
    tolerance: float
    num_equal: int
    num_ties: int
    num_tokens: int

    @property
    def words(self) -> str:
        ties = f", {self.num_ties} a tie within that" if self.num_ties else ""
        return (
            f"{self.reader}: logits differ by {self.difference:.1e} of their spread at most (rounding "
            f"explains {self.tolerance:.0e}), {self.num_equal} of {self.num_tokens} greedy tokens are the "
            f"same{ties}"
        )

    def check(self) -> None:
        """ExportError unless logits are within the tolerance and all tokens the same, but for ties."""
        if not self.difference <= self.tolerance or self.num_equal + self.num_ties < self.num_tokens:
            raise ExportError(
                f"the export should compute what the model does, but it does not ({self.words}): do not "
                "use it."
            )


@torch.no_grad()
def compute_outputs(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    num_tokens: int,
    *,
    as_chat: bool,
    max_positions: int | None = None,
) -> list[PromptOutput]:
    """What a causal LM of transformers or x-transformers says of prompts, by plain passes over whole rows.

    An answer does not stop at an end token, so that its end is compared as well. Of a prompt that does not
    fit into `max_positions` with its answer, the beginning is left out.
    """
    outputs = []
    device = next(model.parameters()).device
    for prompt in prompts:
        whole_ids = tokenizer.encode_prompt((Message("user", prompt),) if as_chat else prompt)
        prompt_ids = whole_ids if max_positions is None else whole_ids[-(max_positions - num_tokens + 1) :]
        ids, rows = list(prompt_ids), []
        for _ in range(num_tokens):
            output = model(torch.tensor([ids], device=device))
            row = getattr(output, "logits", output)[0, -1].float().cpu().numpy()
            rows.append(row)
            ids.append(int(row.argmax()))
        answer = tuple(ids[len(prompt_ids) :])
        is_whole = len(prompt_ids) == len(whole_ids)
        text = write_text(tokenizer, prompt, as_chat=as_chat) if is_whole else None
        outputs.append(PromptOutput(prompt, tuple(prompt_ids), answer, np.stack(rows), text))
    return outputs


def write_text(tokenizer: Tokenizer, prompt: str, *, as_chat: bool) -> str | None:
    """A prompt as text, with the special tokens of a chat template; None where there is no such text."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return None
    text = tokenizer.write_prompt((Message("user", prompt),)) if as_chat else tokenizer.template.mark(prompt)
    return None if MARK in text else text


def compare(outputs: Sequence[PromptOutput], reader: Reader, tolerance: float) -> Agreement:
    """How far an export is apart from what the model said of the same tokens.

    Raises:
        ExportError: the program reads the text of a prompt as other tokens.
    """
    difference, num_equal, num_ties = 0.0, 0, 0
    for output in outputs:
        check_tokens(output, reader)
        num_answered, vocab_size = output.logits.shape
        logits = reader.compute_logits(output.ids)[-num_answered:, :vocab_size]
        if logits.shape != output.logits.shape:
            raise ExportError(
                f"the export should have {vocab_size} logits for a token, but by {reader.name} it has "
                f"{logits.shape[1]}: do not use it."
            )
        spread = float(np.ptp(output.logits)) or 1.0
        largest = float(np.abs(logits - output.logits).max())
        difference = max(difference, largest / spread if np.isfinite(largest) else np.inf)
        found, answer = logits.argmax(axis=1), np.array(output.answer_ids)
        behind = output.logits.max(axis=1) - np.take_along_axis(output.logits, found[:, None], axis=1)[:, 0]
        num_equal += int((found == answer).sum())
        num_ties += int(((found != answer) & (behind <= tolerance * spread)).sum())
    num_tokens = sum(len(output.answer_ids) for output in outputs)
    return Agreement(reader.name, difference, tolerance, num_equal, num_ties, num_tokens)


def check_tokens(output: PromptOutput, reader: Reader) -> None:
    """Raise ExportError if a program reads the text of a prompt as other tokens than the model's."""
    ids = None if output.text is None else reader.tokenize(output.text)
    if ids is None or tuple(ids) == output.prompt_ids:
        return
    pairs = enumerate(zip_longest(ids, output.prompt_ids))
    place = next(k for k, (found, wanted) in pairs if found != wanted)
    raise ExportError(
        f"{reader.name} should read the prompt {output.prompt!r} as the model's tokenizer does, but they "
        f"differ from token {place} on ({ids[place : place + 3]}, and "
        f"{list(output.prompt_ids[place : place + 3])} for the model): do not use the export."
    )
