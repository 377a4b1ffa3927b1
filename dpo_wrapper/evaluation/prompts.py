"""Prompts with completions of a model's own, as text and as tokens."""

from collections.abc import Sequence

from dpo_wrapper.data import Example, Message, TokenizedExample, Tokenizer
from dpo_wrapper.data.rows.messages import Turns, join_answer
from dpo_wrapper.data.tokens.encode import as_dialogue, fit_row
from dpo_wrapper.data.tokens.options import TokenizeOptions

Prompt = str | Turns
"""Plain text, or the messages of a dialogue, as `Example.prompt` has it."""

NO_LIMIT = 1 << 30
TEXT_ROLES = {"user": "Human", "assistant": "Assistant", "tool": "Tool"}


def encode_completions(
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[str]],
    *,
    max_length: int | None = None,
    as_chat: bool | None = None,
) -> list[TokenizedExample]:
    """Each prompt with its completions, as training has them as tokens; a completion may be empty.

    Args:
        tokenizer: of the model.
        prompts: one for each example.
        completions: of each prompt, one or more; each ends as an answer does.
        max_length: tokens of a prompt with one completion; what is longer is cut as in training.
        as_chat: as in `TokenizeOptions`.
    """
    options = TokenizeOptions(max_length=max_length or NO_LIMIT, as_chat=as_chat, score="last")
    return [
        fit_row(Example(prompt, tuple(texts)), tokenizer, options).examples[0]
        for prompt, texts in zip(prompts, completions, strict=True)
    ]


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, as_chat: bool | None = None) -> list[int]:
    """A prompt as a model sees it when it is used; `as_chat` as in `TokenizeOptions`."""
    return tokenizer.encode_prompt(as_dialogue(Example(prompt, ("",)), tokenizer, as_chat).prompt)


def format_prompt(prompt: Prompt) -> str:
    r"""A prompt as one text: a single question as it is, a longer dialogue with `\n\nHuman:` and the like."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0].text
    turns = [f"{TEXT_ROLES.get(turn.role, 'System')}: {turn.text}" for turn in prompt]
    return "\n\n".join(turns)


def join_messages(prompt: Prompt, completion: str) -> Turns:
    """The dialogue of a prompt and its answer; a plain prompt is the user's turn."""
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return join_answer(turns, (Message("assistant", completion),))
