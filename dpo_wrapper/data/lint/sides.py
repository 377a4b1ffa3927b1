"""What tells the sides of a comparison apart, other than that one is better."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_wrapper.data.lint.features import OPENING_BYTES
from dpo_wrapper.data.lint.findings import (
    MIN_ROWS,
    Check,
    Counts,
    FeatureMap,
    Finding,
    count_rows,
    make_finding,
)

LENGTH_BIAS_SHARE, LENGTH_BIAS_EFFECT = 0.6, 0.3
"""Length bias: share of pairs whose chosen is longer, and mean of the difference over its deviation."""

LEADING_SPACE_GAP = 0.2
"""Difference between the shares of the two sides that begin with white space."""

OPENING_SHARE, OPENING_RATIO = 0.1, 5.0
"""Share of one side that begins with the same words, and its ratio to the other side's share."""

REPEATED_PROMPT_SHARE = 0.05
"""Share of a side's completions that begin with the prompt."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison: its rows, and its column in the features of two columns."""

    name: str
    rows: NDArray[np.int64]
    column: int

    def values_of(self, feature: NDArray[Any]) -> NDArray[Any]:
        return feature[self.rows, self.column]


Sides = tuple[Side, Side]


def find_sides(features: FeatureMap) -> list[Sides]:
    """Chosen and rejected of pairs and lists, desirable and undesirable of labelled rows; not of few rows."""
    lists = np.flatnonzero(features["num_completions"] > 1)
    desirable, undesirable = (np.flatnonzero(features["label"] == label) for label in (1, 0))
    found = [
        (Side("chosen", lists, 0), Side("rejected", lists, 1)),
        (Side("desirable", desirable, 0), Side("undesirable", undesirable, 0)),
    ]
    return [sides for sides in found if min(len(side.rows) for side in sides) >= MIN_ROWS]


def check_length_bias(features: FeatureMap, counts: Counts) -> list[Finding]:
    """Where chosen is longer, a model can learn to write more and nothing else.

    Where chosen is shorter this is information: a policy that learns it stops early, which is seen at once.
    """
    rows = np.flatnonzero(features["num_completions"] > 1)
    if len(rows) < MIN_ROWS:
        return []
    chosen, rejected = (features[f"{side}_length"][rows].astype(float) for side in ("chosen", "rejected"))
    difference = chosen - rejected
    mean = difference.mean()
    # lengths are whole numbers: where they hardly vary, one token is the unit
    effect = mean / max(difference.std(), 1.0)
    cohens_d = mean / max(np.sqrt((chosen.var() + rejected.var()) / 2), 1.0)
    longer, shorter = (difference > 0).mean(), (difference < 0).mean()
    is_problem = longer >= LENGTH_BIAS_SHARE and effect >= LENGTH_BIAS_EFFECT
    fact = (
        f"Chosen is longer than rejected in {longer:.1%} of {len(rows):,} pairs and shorter in "
        f"{shorter:.1%}, {mean:+.1f} tokens on average (paired effect {effect:.2f}, Cohen's d {cohens_d:.2f})"
    )
    remedy = "balance the pairs, or take a loss in which length counts less (simpo, or --ld-alpha 0.5)"
    numbers = {
        "longer": longer, "shorter": shorter, "mean": mean, "paired_effect": effect, "cohens_d": cohens_d,
    }  # fmt: skip
    shown = rows[np.argsort(-difference, kind="stable")] if is_problem else ()
    return [make_finding("length_bias", is_problem, fact, remedy, shown, numbers)]


def check_equal_sides(features: FeatureMap, counts: Counts) -> list[Finding]:
    """Sides that differ in white space alone teach white space."""
    rows = np.flatnonzero(features["is_space_apart"])
    if not len(rows):
        return []
    fact = f"Chosen and rejected differ in white space alone in {count_rows(len(rows))}"
    return [make_finding("equal_sides", True, fact, "leave such rows out", rows, {"rows": len(rows)})]


def compare_shares(sides: Sides, shares: list[Any]) -> tuple[str, dict[str, float]]:
    """'20.0% of chosen and 1.0% of rejected completions', and these numbers."""
    first, second = sides
    text = f"{shares[0]:.1%} of {first.name} and {shares[1]:.1%} of {second.name} completions"
    return text, {first.name: shares[0], second.name: shares[1]}


def check_leading_space(features: FeatureMap, counts: Counts) -> list[Finding]:
    """White space at the beginning of one side gives away which one it is."""
    findings = []
    for sides in find_sides(features):
        flags = [side.values_of(features["begins_with_space"]) for side in sides]
        shares = [flag.mean() for flag in flags]
        if abs(shares[0] - shares[1]) >= LEADING_SPACE_GAP:
            more = int(np.argmax(shares))
            text, numbers = compare_shares(sides, shares)
            fact = f"White space begins {text}, which tells the sides apart"
            rows = sides[more].rows[flags[more]]
            findings.append(make_finding("leading_space", True, fact, "begin both alike", rows, numbers))
    return findings


def check_repeated_prompts(features: FeatureMap, counts: Counts) -> list[Finding]:
    """Completions that repeat the prompt teach a model to do so."""
    findings = []
    for sides in find_sides(features):
        flags = [side.values_of(features["repeats_prompt"]) for side in sides]
        shares = [flag.mean() for flag in flags]
        if any(shares):
            text, numbers = compare_shares(sides, shares)
            rows = np.concatenate([side.rows[flag] for side, flag in zip(sides, flags, strict=True)])
            is_problem = max(shares) >= REPEATED_PROMPT_SHARE
            fact, remedy = (
                f"The prompt stands again at the beginning of {text}",
                "remove it there",
            )
            findings.append(
                make_finding("repeated_prompt", is_problem, fact, remedy, np.unique(rows), numbers)
            )
    return findings


def check_openings(features: FeatureMap, counts: Counts) -> list[Finding]:
    """The same first words on one side in many more rows give away which one it is."""
    findings = []
    for sides in find_sides(features):
        openings = [side.values_of(features["opening"]) for side in sides]
        found = find_openings(*openings) + find_openings(*map(first_words, openings))
        if found:
            # the widest gap; of equals the longest words
            opening, *shares = max(found, key=lambda item: (abs(item[1] - item[2]), len(item[0])))
            more = int(np.argmax(shares))
            words = opening.decode(errors="ignore") + "…" * (len(opening) > OPENING_BYTES - 4)
            text, numbers = compare_shares(sides, shares)
            fact = f"“{words}” begins {text}, which tells the sides apart"
            rows = sides[more].rows[np.char.startswith(openings[more], opening)]
            remedy = "rewrite or remove such openings"
            numbers_and_words = {"opening": words, **numbers}
            findings.append(make_finding("opening", True, fact, remedy, rows, numbers_and_words))
    return findings


def find_openings(left: NDArray[np.bytes_], right: NDArray[np.bytes_]) -> list[tuple[bytes, float, float]]:
    """The openings that stand far more often on one side, with their share of either side."""
    found = []
    for side in (left, right):
        values, numbers = np.unique(side, return_counts=True)
        for value in values[numbers >= OPENING_SHARE * len(side)]:
            first, second = (float((column == value).mean()) for column in (left, right))
            if value and max(first, second) >= OPENING_RATIO * min(first, second):
                found.append((bytes(value), first, second))
    return found


def first_words(openings: NDArray[np.bytes_]) -> NDArray[np.bytes_]:
    """The first word of each opening."""
    characters = np.ascontiguousarray(openings).view(np.uint8).reshape(len(openings), -1)
    is_word = np.logical_and.accumulate(characters != ord(" "), axis=1)
    return np.where(is_word, characters, 0).astype(np.uint8).view(openings.dtype)[:, 0]


SIDE_CHECKS: tuple[Check, ...] = (
    check_length_bias, check_equal_sides, check_leading_space, check_openings, check_repeated_prompts,
)  # fmt: skip
