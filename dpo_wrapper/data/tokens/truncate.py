"""Token ids of bounded length: what is too long is cut, and a text is split."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dpo_wrapper.data.rows.messages import SYSTEM_ROLES, Turns, split_system
from dpo_wrapper.data.tokens.encoded import EncodedExample
from dpo_wrapper.data.tokens.tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
"""What half a character is decoded to."""

NUM_LAST = 16
"""Tokens that are decoded to see how a text ends: a character has four at most."""


def cut_dialogue(prompt: Turns, tools: Sequence[Any], length: int, tokenizer: Tokenizer) -> Turns:
    """A dialogue of at most `length` tokens, in which the template stands whole around what is left.

    The earliest turns go first, up to a later question; the system's stay. Where the last question with what
    follows is too long still, the longest text is cut: that of the system at its end, others at their front.
    The result is longer than `length` where the template alone takes more than half of it: no text is cut.
    """

    def excess(turns: Turns) -> int:
        return len(tokenizer.encode_prompt(turns, tools)) - length

    system, others = split_system(prompt)
    starts = [0, *(k for k, turn in enumerate(others) if k and turn.role == "user")]
    index = bisect_left(starts, True, key=lambda start: excess(system + others[start:]) <= 0)
    if index < len(starts):
        return system + others[starts[index] :]
    turns = system + others[starts[-1] :]
    of_template = length + excess(tuple(replace(turn, content="") for turn in turns))
    if 2 * of_template > length:
        return turns
    while (over := excess(turns)) > 0:
        ids = [tokenizer.encode(turn.text) for turn in turns]
        k = max(range(len(turns)), key=lambda k: len(ids[k]))
        if not ids[k]:
            break
        text, over = turns[k].text, min(over, (len(ids[k]) + 1) // 2)  # another may be the longest then
        if turns[k].role in SYSTEM_ROLES:
            text = text[: min(len(tokenizer.decode(ids[k][:-over])), len(text) - 1)]
        else:
            text = text[max(len(text) - len(tokenizer.decode(ids[k][over:])), 1) :]
        turns = (*turns[:k], replace(turns[k], content=text), *turns[k + 1 :])
    return turns


def cut_prompt(encoded: EncodedExample, length: int, tokenizer: Tokenizer) -> EncodedExample:
    """The example with the last `length` tokens of its prompt; BOS stays in front."""
    lost = len(encoded.prompt) - length
    if lost <= 0:
        return encoded
    prompt = encoded.prompt[lost:]
    if encoded.prompt[0] == tokenizer.bos_id:
        prompt[0] = tokenizer.bos_id
    scored = encoded.scored and [mask[lost:] for mask in encoded.scored]
    return replace(encoded, prompt=prompt, scored=scored)


def cut_completions(encoded: EncodedExample, length: int, tokenizer: Tokenizer) -> EncodedExample:
    """The example with at most `length` tokens of each completion."""
    completions = [ids[: find_end(ids, length, tokenizer)] for ids in encoded.completions]
    scored = encoded.scored and [
        mask[: len(encoded.prompt) + len(ids)] for mask, ids in zip(encoded.scored, completions, strict=True)
    ]
    return replace(encoded, completions=completions, scored=scored)


def find_end(ids: list[int], length: int, tokenizer: Tokenizer) -> int:
    """The number of ids to keep of a completion that is cut at `length`: no character is cut in two."""
    for shorter in range(min(4, length)):
        if length >= len(ids) or not ends_inside_character(ids[: length - shorter], tokenizer):
            return length - shorter
    return length  # such a character stands in the text


def ends_inside_character(ids: list[int], tokenizer: Tokenizer) -> bool:
    """Whether the text of ids ends in a part of a character, as far as their decoder says."""
    if not tokenizer.decode(ids[-NUM_LAST:]).endswith(REPLACEMENT):
        return False
    return tokenizer.decode(ids).endswith(REPLACEMENT)  # the last ones may begin inside another character


def split_text(encoded: EncodedExample, max_length: int, tokenizer: Tokenizer) -> list[EncodedExample]:
    """A text in parts of at most `max_length` tokens, in each of which all tokens but the prompt are new.

    The prompt of a part is what the tokenizer puts in front, or without that the last token of the part
    before, by which the first one is predicted. So each token is scored once.

        <bos> a b c d e <eos>     ->     <bos> | a b c        <bos> | d e <eos>
        a b c d e <eos>           ->           | a b c d          d | e <eos>
    """
    if len(encoded.prompt) + len(encoded.completions[0]) <= max_length:
        return [encoded]
    prompt, ids = encoded.prompt, encoded.completions[0]
    mask = encoded.scored[0][len(prompt) :] if encoded.scored else None
    parts, start = [], 0
    while start < len(ids):
        before = prompt if prompt or not start else [ids[start - 1]]
        free = max_length - len(before)
        rest = ids[start : start + free + 2]
        count = min(len(rest), find_end(rest, free, tokenizer))
        if len(rest) - count == 1:  # an EOS alone would teach to say nothing
            count = find_end(rest, count - 1, tokenizer)
        end = start + count
        scored = [[False] * len(before) + mask[start:end]] if mask else None
        parts.append(EncodedExample(before, [ids[start:end]], scored))
        start = end
    return parts
