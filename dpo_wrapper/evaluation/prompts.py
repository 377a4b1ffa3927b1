"""Prompts with completions of a model's own, as text and as tokens."""

import re
from collections.abc import Sequence

from dpo_wrapper.data import Example, Message, TokenizedExample, Tokenizer
from dpo_wrapper.data.rows.messages import Turns, join_answer
from dpo_wrapper.data.tokens.encode import as_dialogue, fit_row
from dpo_wrapper.data.tokens.options import TokenizeOptions

Prompt = str | Turns
"""Plain text, or the messages of a dialogue, as `Example.prompt` has it."""

NO_LIMIT = 1 << 30
TEXT_ROLES = {"user": "Human", "assistant": "Assistant", "tool": "Tool"}
PROBE_WORDS = ("alpha", "beta", "gamma")


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


def decode_prompt(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of a prompt, with the markers between its turns but without a BOS in front of it."""
    text, marked_text = tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=False)
    return text if marked_text.endswith(text) else marked_text


def read_prompt(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """What was said in a prompt, as `format_prompt` writes it, without the system's message.

    What the tokenizer writes around turns is found by a dialogue of known words. A prompt without it, such as
    plain text, is as `decode_prompt` gives it.
    """
    text = tokenizer.decode(ids, skip_special_tokens=False)
    try:
        start, answer, next_question, opening = split_probe(tokenizer, "user", "assistant", "user")
    except ValueError:  # the template takes no such dialogue, or the words are not in it
        return decode_prompt(tokenizer, ids)
    starts = [(start, start)]
    try:
        before, border, _ = split_probe(tokenizer, "system", "user")
        starts.append((before, border))
    except ValueError:
        pass  # the template takes no system's message
    opening = next(opening[:end] for end in range(len(opening), -1, -1) if text.endswith(opening[:end]))
    for before, border in sorted(starts, key=lambda pair: -len(pair[0])):
        if not before or not border or not text.startswith(before) or border not in text:
            continue
        if answer not in text.partition(border)[0]:  # the model begins some dialogues
            turns = []
            for exchange in text.partition(border)[2].removesuffix(opening).split(next_question):
                question, _, reply = exchange.partition(answer)
                turns += [Message("user", question), Message("assistant", reply)][: 2 if reply else 1]
            return format_prompt(tuple(turns))
    return decode_prompt(tokenizer, ids)


def split_probe(tokenizer: Tokenizer, *roles: str) -> list[str]:
    """What stands before, between and behind words that are said in some roles; ValueError if that fails."""
    words = PROBE_WORDS[: len(roles)]
    turns = tuple(map(Message, roles, words))
    text = tokenizer.decode(tokenizer.encode_prompt(turns), skip_special_tokens=False)
    before, *parts = re.split("|".join(words), text)
    if len(parts) != len(words) or not all(parts):
        raise ValueError(f"a prompt should hold {', '.join(words)} once each, apart, but it is {text!r}.")
    return [before, *parts]


def join_messages(prompt: Prompt, completion: str) -> Turns:
    """The dialogue of a prompt and its answer; a plain prompt is the user's turn."""
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return join_answer(turns, (Message("assistant", completion),))
