"""How examples become tokens."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from dpo_wrapper.data.tokens.encoded import Score

OnLong = Literal["cut", "drop", "error"]
"""What becomes of a sequence that is longer than the maximum."""


@dataclass(frozen=True, kw_only=True)
class TokenizeOptions:
    """How examples become tokens.

    Attributes:
        max_length: number of tokens that a prompt with one completion may have, at least 8.
        max_prompt_length: number of tokens that a prompt may have; a longer one is cut.
        on_long: 'cut' shortens what is longer than `max_length` (prompts first), and makes several examples
            of a text without a prompt; 'drop' leaves it out; 'error' refuses it.
        score: the turns that are scored, 'last' or 'assistant'; by default the assistant's turns of
            prompt_completion, and the last of preferences.
        as_chat: whether a plain prompt is the user's turn of a dialogue; by default where the tokenizer has a
            chat template, unless the prompt has been written by one already.
        allow_empty: whether a completion may have no text, so that its end alone is scored.

    Raises:
        ValueError: an option that cannot be.
    """

    max_length: int
    max_prompt_length: int | None = None
    on_long: OnLong = "cut"
    score: Score | None = None
    as_chat: bool | None = None
    allow_empty: bool = False

    def __post_init__(self) -> None:
        if not is_integer(self.max_length) or self.max_length < 8:
            problem = f"max_length should be an integer of at least 8, but it is {self.max_length!r}"
            raise ValueError(f"{problem}: choose how many tokens prompt and completion may have together.")
        longest = self.max_prompt_length
        if longest is not None and not (is_integer(longest) and 0 < longest < self.max_length):
            expected = f"an integer from 1 to {self.max_length - 1}, below max_length"
            problem = f"max_prompt_length should be {expected}"
            raise ValueError(f"{problem}, but it is {longest!r}: choose how many tokens of prompts to keep.")
        if self.on_long not in get_args(OnLong):
            problem = f"on_long should be 'cut', 'drop' or 'error', but it is {self.on_long!r}"
            raise ValueError(f"{problem}: choose one of them.")
        if self.score not in (None, *get_args(Score)):
            problem = f"score should be 'last' or 'assistant', but it is {self.score!r}"
            raise ValueError(f"{problem}: choose one of them.")


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
