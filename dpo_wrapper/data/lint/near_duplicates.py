"""Duplicates, and near duplicates: rows whose signatures (MinHash, Broder 1997) agree."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

SHINGLE = 5
"""Tokens of a shingle, the unit in which two texts are compared."""

MIN_SHINGLES = 64
"""Completions with fewer shingles are short: such rows are near duplicates only if their words are equal."""

PROMPT_BINS, COMPLETION_BINS, BAND = 12, 36, 6
SIGNATURE = PROMPT_BINS + COMPLETION_BINS
"""Bytes of a signature. Prompt and completions have bytes of their own, so that both must agree."""

MIN_SIMILARITY = 0.85
"""Share of shingles that two rows have in common, from which on they are near duplicates."""

_EMPTY = np.uint32(0xFFFFFFFF)
_FACTORS = tuple(np.uint32(odd) for odd in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35))


def sign_sequences(
    sequences: Sequence[Sequence[int]],
    rows: Sequence[int],
    sides: Sequence[int],
    num_rows: int,
    num_bins: int,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Signatures of the shingles of each row, by one permutation hashing (Li, Owen and Zhang 2012).

    Every shingle falls by its hash into one of the bins of its row, and a bin keeps the least hash. Two rows
    agree in a bin about as often as a shingle of either is a shingle of both.

    Args:
        sequences: token ids.
        rows: the row of each sequence.
        sides: numbers of which equal ones make shingles of two sequences comparable.
        num_rows, num_bins: size of the result.

    Returns:
        UInt8[num_rows, num_bins], 0 for a bin without a shingle, and the number of shingles of each row.
    """
    gap = (-1,) * (SHINGLE - 1)  # so that no shingle goes over a border; those at an end are filled up
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    size = int(lengths.sum()) + len(gap) * len(sequences)
    parts = [part for sequence in sequences for part in (sequence, gap)]
    ids = np.fromiter(chain.from_iterable([*parts, gap]), np.int32, size + len(gap))
    hashes = _hash_shingles(ids.view(np.uint32))
    repeats = lengths + len(gap)
    hashes ^= np.repeat(np.asarray(sides, np.uint32) * _FACTORS[0], repeats)
    bins = ((hashes >> np.uint32(16)) * np.uint32(num_bins) >> np.uint32(16)).astype(np.int64)
    bins += np.repeat(np.asarray(rows, np.int64) * num_bins, repeats)
    ends = np.cumsum(repeats)
    for back in range(1, SHINGLE):  # what begins in a gap is no shingle
        bins[ends - back] = num_rows * num_bins
    least = np.full(num_rows * num_bins + 1, _EMPTY)
    np.minimum.at(least, bins, hashes)
    least = least[:-1]
    signature = np.where(least == _EMPTY, 0, least % 255 + 1).astype(np.uint8)
    counts = np.bincount(np.asarray(rows, np.int64), lengths, num_rows).astype(np.int64)
    return signature.reshape(num_rows, num_bins), counts


def _hash_shingles(ids: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A hash of each SHINGLE ids that follow one another: four fewer than ids."""
    first, second, third = _FACTORS
    ids = (ids + np.uint32(1)) * first  # 0 in a gap
    ids ^= ids >> np.uint32(15)
    two = ids[:-1] * second + ids[1:]
    four = two[:-2] * third + two[2:]
    hashes = four[:-1] * first + ids[4:]
    for factor in (second, third):
        hashes ^= hashes >> np.uint32(16)
        hashes *= factor
    hashes ^= hashes >> np.uint32(16)
    return hashes


def find_first(digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which rows of UInt64[n, 2] no earlier row equals, Bool[n]."""
    order = np.lexsort(digests.T)  # which keeps equal rows in their order
    ordered = digests[order]
    is_new = np.ones(len(digests), bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    is_first = np.zeros(len(digests), bool)
    is_first[order[is_new]] = True
    return is_first


def find_near_duplicates(signatures: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The first row of each row's group of near duplicates; a row that has none is its own group.

    Rows that agree in a band of BAND bins are compared: with the first such row, and with the one before.
    Rows of similarity 0.85 share a band in 94 of 100 cases, those of 0.9 in 99.

    Args:
        signatures: UInt8[n, SIGNATURE].

    Returns:
        Int[n], the index of a row, at most the row's own.
    """
    pairs = []
    for start in range(PROMPT_BINS, SIGNATURE, BAND):
        keys = np.zeros((len(signatures), 8), np.uint8)
        keys[:, :BAND] = signatures[:, start : start + BAND]
        pairs += _find_candidates(keys.view(np.uint64)[:, 0], signatures)
    groups = np.arange(len(signatures))
    if pairs:
        left, right = np.concatenate(pairs, axis=1)
        while (groups[left] != groups[right]).any():
            least = np.minimum(groups[left], groups[right])
            for ends in (left, right):
                np.minimum.at(groups, groups[ends], least)
            groups = groups[groups]
    return groups


def _find_candidates(keys: NDArray[np.uint64], signatures: NDArray[np.uint8]) -> list[NDArray[np.int64]]:
    """Pairs of rows with equal keys whose signatures agree, as Int[2, n] each."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    is_same = np.flatnonzero((keys[1:] == keys[:-1]) & (keys[1:] != 0)) + 1
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    first = starts[np.searchsorted(starts, is_same, "right") - 1]
    found = []
    for other in (first, is_same - 1):
        pairs = np.stack([order[other], order[is_same]])
        for at in range(0, pairs.shape[1], 1 << 18):
            part = pairs[:, at : at + (1 << 18)]
            found.append(part[:, is_similar(signatures[part[0]], signatures[part[1]])])
    return found


def is_similar(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether signatures agree in MIN_SIMILARITY of the prompt's bins and of the completions'."""
    is_equal, is_filled = left == right, (left != 0) | (right != 0)
    is_equal &= is_filled
    result = np.ones(len(left), bool)
    for part in (slice(PROMPT_BINS), slice(PROMPT_BINS, SIGNATURE)):
        result &= is_equal[:, part].sum(1) >= MIN_SIMILARITY * is_filled[:, part].sum(1)
    return result
