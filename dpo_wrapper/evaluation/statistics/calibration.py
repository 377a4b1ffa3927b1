"""Calibration of the implicit reward, and accuracy by length: figures of bins of pairs."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpo_wrapper.evaluation.statistics.bootstrap import Floats, Statistic, divide, mean_of
from dpo_wrapper.evaluation.statistics.win_rate import sigmoid

NUM_CONFIDENCE_BINS = 5


@dataclass(frozen=True)
class Bin:
    """Some of `n` pairs.

    Attributes:
        low, high: of what pairs are sorted by.
        is_inside: Bool[n].
    """

    low: float
    high: float
    is_inside: NDArray[np.bool_]

    @property
    def count(self) -> int:
        return int(self.is_inside.sum())


def split_by_edges(values: Floats, edges: Floats) -> list[Bin]:
    """A bin between each two edges that follow each other; an edge between two belongs to the upper one."""
    index = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    return [Bin(float(edges[k]), float(edges[k + 1]), index == k) for k in range(len(edges) - 1)]


def calibration_statistics(margin: Floats, is_right: Floats) -> dict[str, Statistic]:
    """Errors of `σ(margin)` as the probability that chosen wins (Bradley and Terry; Rafailov 2023, eq. 1).

    A pair is predicted with the confidence `σ(|margin|)`, from a half to 1.

    `calibration/error` is the expected calibration error of Guo et al. 2017 (arXiv 1706.04599), eq. 3: how
    far accuracy and mean confidence of equal bins of confidence are apart, weighted by pairs.
    `calibration/brier` is the mean of `(1 - σ(margin))²`, a quarter where nothing is known.
    `calibration/log_loss` is the mean of `-log σ(margin)` in nats, ln 2 where nothing is known.
    """
    confidence = sigmoid(np.abs(margin))
    bins = split_by_edges(confidence, confidence_edges())
    gaps = np.stack([(confidence - is_right) * one.is_inside for one in bins], axis=1)
    columns = np.concatenate([gaps, np.ones((len(margin), 1))], axis=1)
    return {
        "calibration/error": Statistic(
            columns, lambda sums: divide(np.abs(sums[..., :-1]).sum(axis=-1), sums[..., -1])
        ),
        "calibration/brier": mean_of((1 - sigmoid(margin)) ** 2),
        "calibration/log_loss": mean_of(np.logaddexp(0.0, -margin)),
    }


def confidence_edges() -> Floats:
    return np.linspace(0.5, 1.0, NUM_CONFIDENCE_BINS + 1)


def confidence_bins(margin: Floats) -> list[Bin]:
    """The rows of a table of reliability: pairs by the confidence of their prediction."""
    return split_by_edges(sigmoid(np.abs(margin)), confidence_edges())


def length_bins(difference: NDArray[np.int64]) -> list[Bin]:
    """Pairs by the difference of their lengths: two bins of shorter chosen answers, equal, two of longer.

    Unlike those of confidence they hold their upper edge. Empty ones are left out.
    """
    shorter, longer = difference[difference < 0], difference[difference > 0]
    spans = [*halve(shorter), (0, 0), *halve(longer)]
    bins = [Bin(low, high, (difference >= low) & (difference <= high)) for low, high in spans]
    return [one for one in bins if one.count]


def halve(values: NDArray[np.int64]) -> list[tuple[int, int]]:
    """The spans of the smaller and of the larger half of some integers."""
    if not len(values):
        return []
    low, middle, high = (int(x) for x in np.quantile(values, [0, 0.5, 1], method="lower"))
    return [(low, middle), (middle + 1, high)]
