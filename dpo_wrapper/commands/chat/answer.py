"""Answers that are seen while they are generated."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dpo_wrapper.data import Tokenizer
from dpo_wrapper.evaluation.generate import generate, list_end_ids
from dpo_wrapper.evaluation.sampling import Sampling


class AnswerEndError(Exception):
    """Ends the generation of an answer that has come to its end."""


class TextStream:
    """The text of tokens that come one by one; all of it is what the tokenizer makes of all of them.

    Args:
        show: is called with each piece of the text. A character of several tokens is in one piece.
    """

    def __init__(self, tokenizer: Tokenizer, show: Callable[[str], object]) -> None:
        self.tokenizer, self.show = tokenizer, show
        self.ids: list[int] = []
        self.text = ""

    def put(self, id_: int) -> None:
        """Add a token."""
        self.ids.append(id_)
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\ufffd"):  # the first bytes of a character
            self.show_rest(text)

    def end(self) -> None:
        """Show what is left."""
        self.show_rest(self.tokenizer.decode(self.ids))

    def show_rest(self, text: str) -> None:
        shown, self.text = len(self.text), max(self.text, text, key=len)
        if len(text) > shown:
            self.show(text[shown:])


def stream_answer(
    model: Any,
    prompt: Sequence[int],
    tokenizer: Tokenizer,
    max_new_tokens: int,
    show: Callable[[str], object],
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    max_positions: int | None = None,
) -> tuple[str, bool]:
    """Generate an answer as `generate` does, and show it piece by piece.

    Args:
        prompt: its ids.
        show: as in `TextStream`.
        seed: of the answer, where `sampling` is not None.

    Returns the answer, and whether KeyboardInterrupt has stopped it.
    """
    stream, end_ids = TextStream(tokenizer, show), list_end_ids(tokenizer)

    def put_token(tokens: Tensor) -> None:
        id_ = int(tokens[0])
        if id_ in end_ids:
            raise AnswerEndError
        stream.put(id_)

    is_stopped = False
    options: dict[str, Any] = {"sampling": sampling, "seeds": [seed], "max_positions": max_positions}
    try:
        generate(model, [prompt], max_new_tokens, end_ids, on_tokens=put_token, **options)
    except AnswerEndError:
        pass
    except KeyboardInterrupt:
        is_stopped = True
    stream.end()
    return stream.text, is_stopped
