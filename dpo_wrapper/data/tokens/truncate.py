"""Token ids of bounded length: what is too long is cut, and a text is split."""

from dataclasses import replace

from dpo_wrapper.data.tokens.encoded import EncodedExample
from dpo_wrapper.data.tokens.tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
"""What half a character is decoded to."""

NUM_LAST = 16
"""Tokens that are decoded to see how a text ends: a character has four at most."""


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
