"""Win rates of one model's answers over another's, also with lengths controlled for."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpo_wrapper.evaluation.statistics.bootstrap import (
    Estimate,
    bound_constant,
    draw_counts,
    find_interval,
)

Floats = NDArray[np.float64]

PENALTY = np.array([0.01, 0.1])
"""Inverse variances of the normal priors of quality and length: weak, but a fit exists where all are won."""

MAX_STEPS = 50


@dataclass(frozen=True)
class WinRates:
    """Shares of prompts whose first answer is better; a tie counts half.

    Attributes:
        raw: the share as it is.
        length_controlled: what it would be at equal lengths.
        length_weight: the coefficient of length: positive where the judge prefers longer answers.
    """

    raw: Estimate
    length_controlled: Estimate
    length_weight: Estimate


def compare_answers(
    scores: Floats,
    other_scores: Floats,
    lengths: Floats,
    other_lengths: Floats,
    *,
    groups: NDArray[np.int64] | None = None,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> WinRates:
    """Win rates of answers over others to the same prompts, by a judge's scores of both.

    Dubois et al. 2024, "Length-Controlled AlpacaEval" (arXiv 2404.04475), without the term for the difficulty
    of instructions, which takes several models to estimate (AlpacaEval has it so as
    `length_controlled_minimal`). A logistic regression of winning has
    a constant for quality and the term `φ tanh(d / std(d))` of the difference of lengths `d`. The controlled
    rate is what it predicts at `d = 0`.

    Args:
        scores, other_scores: Float[n], the judge's.
        lengths, other_lengths: Float[n], in characters, as in AlpacaEval.
        groups, num_resamples, confidence, seed: as in `estimate`; by default each answer is its own group.
    """
    wins = np.where(scores == other_scores, 0.5, (scores > other_scores).astype(np.float64))
    length = scale_differences(lengths - other_lengths)
    _, group = np.unique(np.arange(len(wins)) if groups is None else groups, return_inverse=True)
    num_groups = int(group.max()) + 1
    value = summarize(np.ones((1, len(wins))), wins, length)[0]
    drawn = [summarize(c[:, group], wins, length) for c in draw_counts(num_groups, num_resamples, seed)]
    left_out = summarize(1.0 - np.eye(num_groups)[:, group], wins, length)
    columns = zip(value, np.concatenate(drawn).T, left_out.T, strict=True)
    raw, controlled, weight = (find_interval(*column, confidence) for column in columns)
    if raw.value in (0.0, 1.0):  # which all resamples are, however few the answers
        raw = bound_constant(raw.value, num_groups, confidence)
        controlled = widen(controlled, raw)
    return WinRates(raw, controlled, weight)


def widen(one: Estimate, other: Estimate) -> Estimate:
    """An estimate whose interval, if it has one, holds that of another as well."""
    if one.bounds is None or other.bounds is None:
        return one
    bounds = [*one.bounds, *other.bounds]
    return Estimate(one.value, min(bounds), max(bounds))


def scale_differences(differences: Floats) -> Floats:
    """`tanh(d / std(d))`; zeros where all lengths are equal."""
    spread = differences.std()
    return np.tanh(differences / spread) if spread > 0 else np.zeros_like(differences)


def summarize(weights: Floats, wins: Floats, length: Floats) -> Floats:
    """Raw rate, controlled rate and length weight under each row of weights, Float[b, 3]."""
    total = weights.sum(axis=1)
    raw = np.where(total > 0, weights @ wins / np.maximum(total, 1e-300), np.nan)
    fitted = fit_logistic(weights, wins, length)
    return np.stack([raw, sigmoid(fitted[:, 0]), fitted[:, 1]], axis=1)


def fit_logistic(weights: Floats, wins: Floats, length: Floats) -> Floats:
    """Constant and slope of penalized logistic regressions, one for each row of weights, by Newton's steps.

    Args:
        weights: Float[b, n], of the answers in each regression.
        wins: Float[n], from 0 to 1.
        length: Float[n], the covariate.

    Returns:
        Float[b, 2].
    """
    design = np.stack([np.ones_like(length), length], axis=1)
    coefficients = np.zeros((len(weights), 2))
    for _ in range(MAX_STEPS):
        probs = sigmoid(coefficients @ design.T)
        gradient = (weights * (wins - probs)) @ design - PENALTY * coefficients
        curvature = weights * probs * (1 - probs)
        hessian = np.einsum("bn,ni,nj->bij", curvature, design, design, optimize=True) + np.diag(PENALTY)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        size = np.abs(step).max(axis=1, keepdims=True)
        coefficients += step / np.maximum(1.0, size)  # a step of at most 1 does not overshoot
        if size.max() < 1e-10:
            break
    return coefficients


def sigmoid(x: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(0.5 * x))
