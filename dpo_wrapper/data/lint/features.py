"""What the checks of a data set need to know of each row, as arrays."""

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_wrapper.data.examples import DATASET_TYPES, Example, TokenIds, TokenizedExample
from dpo_wrapper.data.lint.near_duplicates import (
    COMPLETION_BINS,
    MIN_SHINGLES,
    PROMPT_BINS,
    SIGNATURE,
    sign_sequences,
)
from dpo_wrapper.data.rows.dialogues import Completion
from dpo_wrapper.data.split import prompt_digest

Features = dict[str, NDArray[Any]]
Row = tuple[Example, tuple[TokenizedExample, ...]]

SPLITS = (None, "train", "test")
OPENING_WORDS = 3
OPENING_BYTES = 16
BLOCK = 500
"""Rows whose tokens are hashed at once."""
MIN_REPEATED_PROMPT = 20
"""Characters of a prompt, below which a completion may begin with it by chance."""


def measure_rows(rows: Sequence[Row]) -> Features:
    """Measure each row for `find_problems`. What is measured of a row depends on this row alone.

    Args:
        rows: an example and what it became as tokens: one example, or several for a long document.

    Returns:
        Arrays with one value per row, 153 bytes a row in all. Lengths are in tokens.

        dataset_type      Int8[n], index into DATASET_TYPES
        split             Int8[n], index into SPLITS
        label             Int8[n], -1 without a label
        num_completions   Int32[n]
        num_ties          Int32[n], completions as good as another one of their list
        is_cut            Bool[n], prompt or completions lost tokens; never of documents
        prompt_length     Int32[n]
        chosen_length     Int32[n], of the best completion, or the only one
        rejected_length   Int32[n], of the worst completion; 0 if there is one alone
        longest           Int32[n], of the longest sequence
        num_tokens        Int32[n], of all sequences
        num_unique_tokens Int32[n], of all sequences as a tree in which a common prefix stands once
        prompt_digest     UInt64[n]
        content_digest    UInt64[n, 2], equal where prompt, completions and label are
        unordered_digest  UInt64[n], the same without order of the completions and without label
        is_space_apart    Bool[n], best and worst completion differ in white space alone
        begins_with_space Bool[n, 2], the best and the worst completion
        repeats_prompt    Bool[n, 2], the completion begins with the last turn of the prompt
        opening           Bytes[n, 2], the first words of each
        signature         UInt8[n, SIGNATURE], for near duplicates
    """
    texts = [tuple(map(_text_of, example.completions)) for example, _ in rows]
    features = _measure_tokens(rows)
    features |= _measure_texts([example for example, _ in rows], texts)
    blocks = range(0, len(rows), BLOCK)  # arrays that fit into a processor's cache
    parts = [_sign_rows(rows[at : at + BLOCK], texts[at : at + BLOCK]) for at in blocks]
    features["signature"] = np.concatenate([np.zeros((0, SIGNATURE), np.uint8), *parts])
    return features


def _measure_tokens(rows: Sequence[Row]) -> Features:
    names = (
        "dataset_type", "split", "label", "is_cut", "num_completions", "num_ties", "prompt_length",
        "chosen_length", "rejected_length", "longest", "num_tokens", "num_unique_tokens",
    )  # fmt: skip
    table = []
    for example, tokenized in rows:
        lengths = [(len(part.prompt), len(ids)) for part in tokenized for ids in part.completions]
        ranks = example.ranks or ()
        is_list = len(example.completions) > 1
        sizes = [prompt + completion for prompt, completion in lengths]
        table.append((
            DATASET_TYPES.index(example.dataset_type),
            SPLITS.index(example.split),
            -1 if example.label is None else example.label,
            not example.is_document and any(part.is_cut for part in tokenized),
            len(example.completions),
            len(ranks) - len(set(ranks)),
            lengths[0][0],
            lengths[0][1] if is_list else sum(completion for _, completion in lengths),
            lengths[-1][1] if is_list else 0,
            max(sizes),
            sum(sizes),
            sum(map(_count_unique, tokenized)),
        ))  # fmt: skip
    columns = np.array(table, np.int32).reshape(len(rows), len(names)).T.copy()
    features: Features = dict(zip(names, columns, strict=True))
    for name in ("dataset_type", "split", "label"):
        features[name] = features[name].astype(np.int8)
    features["is_cut"] = features["is_cut"].astype(bool)
    return features


def _count_unique(example: TokenizedExample) -> int:
    """Tokens of the prompt and of the completions as a tree."""
    completions = example.completions
    shared = sum(_count_shared(*pair) for pair in pairwise(sorted(completions))) if completions[1:] else 0
    return len(example.prompt) + sum(map(len, completions)) - shared


def _count_shared(left: TokenIds, right: TokenIds) -> int:
    """Length of the common prefix."""
    for count, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return count
    return min(len(left), len(right))


def _measure_texts(examples: Sequence[Example], texts: Sequence[tuple[str, ...]]) -> Features:
    digests, flags, openings = [], [], []
    for example, completions in zip(examples, texts, strict=True):
        digests.append(_digest_row(example, completions))
        sides = (completions[0], completions[-1])
        question = _last_turn(example).strip()
        is_long = len(question) >= MIN_REPEATED_PROMPT
        flags.append((
            len(completions) > 1 and _is_space_apart(*sides),
            *(side[:1].isspace() for side in sides),
            *(is_long and side.lstrip().startswith(question) for side in sides),
        ))  # fmt: skip
        openings.append(tuple(map(_open_text, sides)))
    digest = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 4)
    flag = np.array(flags, bool).reshape(-1, 5)
    return {
        "prompt_digest": digest[:, 0].copy(),
        "content_digest": digest[:, 1:3].copy(),
        "unordered_digest": digest[:, 3].copy(),
        "is_space_apart": flag[:, 0].copy(),
        "begins_with_space": flag[:, 1:3].copy(),
        "repeats_prompt": flag[:, 3:].copy(),
        "opening": np.array(openings, f"S{OPENING_BYTES}").reshape(-1, 2),
    }


def _digest_row(example: Example, texts: tuple[str, ...]) -> bytes:
    """Hashes of the prompt (8 bytes), of all content (16) and of the content without its order (8)."""
    prompt = prompt_digest(example).to_bytes(8, "little")
    turns = () if isinstance(example.prompt, str) else example.prompt
    extras = [dict(turn.extras) for turn in turns if turn.extras]
    if extras or example.tools or example.loss_masking_spans or example.is_document:
        fields = (extras, example.tools, example.loss_masking_spans, example.is_document)
        prompt_and_extras = prompt + repr(fields).encode()
    else:
        prompt_and_extras = prompt
    parts = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
    order = repr((example.label, example.ranks)).encode()
    content = hashlib.blake2b(b"".join([prompt_and_extras, *parts, order]), digest_size=16).digest()
    unordered = hashlib.blake2b(b"".join([prompt_and_extras, *sorted(parts)]), digest_size=8).digest()
    return prompt + content + unordered


def _text_of(completion: Completion) -> str:
    """A completion as text; turns that say more than text are told apart."""
    if isinstance(completion, str):
        return completion
    if len(completion) == 1 and not completion[0].extras:
        return completion[0].text
    return "\n\n".join(f"{turn.text}{dict(turn.extras) or ''}" for turn in completion)


def _last_turn(example: Example) -> str:
    """The text that a completion answers."""
    if isinstance(example.prompt, str):
        return example.prompt
    return next((turn.text for turn in reversed(example.prompt) if turn.role == "user"), "")


def _is_space_apart(left: str, right: str) -> bool:
    """Whether two texts differ in white space alone."""
    starts = ["".join(text[:64].split()) for text in (left, right)]
    length = min(map(len, starts))  # most texts differ early
    if left == right or starts[0][:length] != starts[1][:length]:
        return False
    return "".join(left.split()) == "".join(right.split())


def _open_text(text: str) -> bytes:
    """The first words of a text, at most OPENING_BYTES."""
    words = text[: 4 * OPENING_BYTES].split(None, OPENING_WORDS)[:OPENING_WORDS]
    cut = " ".join(words).encode()[:OPENING_BYTES]
    return cut.decode(errors="ignore").encode()


def _sign_rows(rows: Sequence[Row], texts: Sequence[tuple[str, ...]]) -> NDArray[np.uint8]:
    """The signature of each row: of prompt and completions, or of a short row's words."""
    completions: list[TokenIds] = []
    owners: list[int] = []
    sides: list[int] = []
    for index, (_, tokenized) in enumerate(rows):
        for part in tokenized:
            completions += part.completions
            owners += [index] * len(part.completions)
            sides += range(len(part.completions))
    prompts = [tokenized[0].prompt for _, tokenized in rows]
    first, _ = sign_sequences(prompts, range(len(rows)), [0] * len(rows), len(rows), PROMPT_BINS)
    last, counts = sign_sequences(completions, owners, sides, len(rows), COMPLETION_BINS)
    signature = np.concatenate([first, last], axis=1)
    for index in np.flatnonzero(counts < MIN_SHINGLES).tolist():
        question = _last_turn(rows[index][0])
        words = repr([" ".join(text.lower().split()) for text in (question, *texts[index])]).encode()
        signature[index] = np.frombuffer(hashlib.blake2b(words, digest_size=SIGNATURE).digest(), np.uint8)
    return signature
