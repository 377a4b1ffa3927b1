"""Signatures of rows: how well they tell what rows have in common, and which rows they bring together."""

import random

import numpy as np

from dpo_wrapper.data.lint.near_duplicates import (
    COMPLETION_BINS,
    MIN_SIMILARITY,
    PROMPT_BINS,
    SHINGLE,
    SIGNATURE,
    find_near_duplicates,
    is_similar,
    sign_sequences,
)


def sign(sequences: list[list[int]]) -> np.ndarray:
    """Signatures of rows that have the same prompt and one completion each."""
    rows, sides, number = range(len(sequences)), [0] * len(sequences), len(sequences)
    first, _ = sign_sequences([[1, 2, 3]] * number, rows, sides, number, PROMPT_BINS)
    last, _ = sign_sequences(sequences, rows, sides, number, COMPLETION_BINS)
    return np.concatenate([first, last], axis=1)


def shingles(ids: list[int]) -> set[tuple[int, ...]]:
    padded = [*ids, *[-1] * (SHINGLE - 1)]
    return {tuple(padded[start : start + SHINGLE]) for start in range(len(ids))}


def similarity(left: list[int], right: list[int]) -> float:
    one, other = shingles(left), shingles(right)
    return len(one & other) / len(one | other)


def edit(ids: list[int], share: float, generator: random.Random) -> list[int]:
    """The ids, of which a stretch has been written anew."""
    count = int(share * len(ids))
    start = generator.randrange(len(ids) - count)
    return [*ids[:start], *(generator.randrange(30_000) for _ in range(count)), *ids[start + count :]]


def make_versions(share: float, count: int = 400) -> tuple[list[list[int]], list[list[int]]]:
    generator = random.Random(0)
    texts = [[generator.randrange(30_000) for _ in range(300)] for _ in range(count)]
    return texts, [edit(text, share, generator) for text in texts]


def agreement(left: np.ndarray, right: np.ndarray) -> float:
    """Share of the completions' bins in which signatures agree."""
    return float((left == right)[:, PROMPT_BINS:].mean())


def test_signatures_agree_as_often_as_shingles_are_shared() -> None:
    for share in (0.0, 0.05, 0.3, 0.7):
        texts, versions = make_versions(share)
        expected = np.mean([similarity(*pair) for pair in zip(texts, versions, strict=True)])
        # 14,400 bins: a deviation of at most 0.5 / √14400 = 0.004, and 1 in 255 agrees by chance
        assert abs(agreement(sign(texts), sign(versions)) - expected) < 0.02


def test_similar_rows_are_found_and_others_are_not() -> None:
    for share, least, most in ((0.01, 0.98, 1.0), (0.03, 0.9, 1.0), (0.2, 0.0, 0.03), (0.9, 0.0, 0.0)):
        texts, versions = make_versions(share)
        groups = find_near_duplicates(sign(texts + versions))
        assert (groups[:400] == np.arange(400)).all()
        found = (groups[400:] == np.arange(400)).mean()
        assert least <= found <= most, share
        assert ((groups[400:] == np.arange(400)) | (groups[400:] == np.arange(400, 800))).all()


def test_groups_are_those_of_all_pairs_that_agree() -> None:
    generator = np.random.default_rng(0)
    signatures = generator.integers(1, 256, (60, SIGNATURE), dtype=np.uint8)
    for row in range(20, 60):  # each a version of an earlier one, of which up to two bins differ
        signatures[row] = signatures[generator.integers(row)]
        signatures[row, generator.integers(PROMPT_BINS, SIGNATURE, 2)] ^= 1
    agrees = np.stack([is_similar(signatures, signatures[[row] * 60]) for row in range(60)])
    for _ in range(6):  # paths of up to 2 ** 6 rows
        agrees = agrees @ agrees
    expected = agrees.argmax(1)
    groups = find_near_duplicates(signatures)
    assert len(set(groups)) < 25
    np.testing.assert_array_equal(groups, expected)


def test_prompts_count_for_themselves() -> None:
    signatures = np.full((3, SIGNATURE), 7, np.uint8)
    signatures[1, :2] = 8  # 10 of 12 are 0.83 of the prompt, 46 of 48 are 0.96 of all
    signatures[2, :1] = 8
    assert MIN_SIMILARITY > 10 / 12
    assert find_near_duplicates(signatures).tolist() == [0, 0, 0]  # by the third, which is near both
    assert find_near_duplicates(signatures[:2]).tolist() == [0, 1]


def test_bins_without_a_shingle_say_nothing() -> None:
    signatures = np.zeros((4, SIGNATURE), np.uint8)
    assert find_near_duplicates(signatures).tolist() == [0, 1, 2, 3]
    signatures[:2, 20] = 5
    assert find_near_duplicates(signatures).tolist() == [0, 0, 2, 3]


def test_no_shingle_goes_over_the_end_of_a_sequence() -> None:
    alone, count = sign_sequences([[1, 2, 3, 4, 5, 6]], [0], [0], 1, 48)
    among, counts = sign_sequences([[7] * 9, [1, 2, 3, 4, 5, 6], [8, 9], []], [0, 1, 2, 2], [0] * 4, 3, 48)
    np.testing.assert_array_equal(alone[0], among[1])
    assert count.tolist() == [6] and counts.tolist() == [9, 6, 2]
    assert np.count_nonzero(alone) <= 6
    other_side, _ = sign_sequences([[1, 2, 3, 4, 5, 6]], [0], [1], 1, 48)
    assert (other_side != alone).any()
