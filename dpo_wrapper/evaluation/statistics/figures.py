"""All figures of an evaluation, each with its interval, as evaluation.json has them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_wrapper.evaluation.statistics.bootstrap import (
    Estimate,
    Floats,
    Statistic,
    divide,
    estimate,
    share_of,
)
from dpo_wrapper.evaluation.statistics.calibration import (
    Bin,
    calibration_statistics,
    confidence_bins,
    length_bins,
)
from dpo_wrapper.evaluation.statistics.pair_scores import (
    PairScores,
    length_statistics,
    log_prob_statistics,
    reward_statistics,
)
from dpo_wrapper.evaluation.statistics.win_rate import sigmoid

CONFIDENCE = 0.95
"""Share of the intervals that should hold the true figure."""

ACCURACY = "rewards/accuracies"
BALANCED = "accuracy/lengths_balanced"
SUBSET_MEAN = "rewards/accuracies_of_subsets"


@dataclass(frozen=True)
class Resampling:
    """How intervals are made.

    Attributes:
        prompts: Int[n], equal for pairs of one prompt.
        num_resamples, seed: as in `estimate`.
    """

    prompts: NDArray[np.int64]
    num_resamples: int = 2000
    seed: int = 0

    def estimate(self, statistics: Mapping[str, Statistic]) -> dict[str, Estimate]:
        return estimate(
            statistics,
            self.prompts,
            num_resamples=self.num_resamples,
            confidence=CONFIDENCE,
            seed=self.seed,
        )

    def select(self, index: NDArray[Any]) -> "Resampling":
        """For some of the pairs."""
        return replace(self, prompts=self.prompts[index])

    @property
    def num_prompts(self) -> int:
        return len(np.unique(self.prompts))


def estimate_figures(
    pairs: PairScores,
    subsets: Sequence[str | None],
    resampling: Resampling,
    *,
    has_probability: bool = True,
) -> dict[str, Any]:
    """The figures of all pairs and of each subset, with tables of bins.

    Args:
        pairs: their scores.
        subsets: of each pair, or None.
        resampling: of the same pairs.
        has_probability: whether `σ(margin)` is a probability that chosen wins, so that it can be calibrated.
    """
    names = sorted({name for name in subsets if name is not None})
    labels = np.array([name or "" for name in subsets])
    statistics = reward_statistics(pairs) | log_prob_statistics(pairs) | length_statistics(pairs)
    if has_probability:
        statistics |= calibration_statistics(pairs.margin, pairs.is_right)
    if names:
        statistics[SUBSET_MEAN] = mean_of_subsets(pairs.is_right, labels, names)
    content: dict[str, Any] = {
        "pairs": len(pairs),
        "prompts": resampling.num_prompts,
        "figures": as_json(widen_balanced(resampling.estimate(statistics))),
        "length_bins": describe_bins(length_bins(pairs.length_difference), pairs, resampling),
    }
    if has_probability:
        content["reliability"] = describe_bins(confidence_bins(pairs.margin), pairs, resampling)
    if names:
        content["subsets"] = {
            name: estimate_subset(pairs, labels == name, resampling.select(labels == name)) for name in names
        }
    return content


def estimate_subset(pairs: PairScores, index: NDArray[np.bool_], resampling: Resampling) -> dict[str, Any]:
    part = PairScores(pairs.chosen[index], pairs.rejected[index])
    found = resampling.estimate(reward_statistics(part) | length_statistics(part))
    figures = as_json(widen_balanced(found))
    return {"pairs": len(part), "prompts": resampling.num_prompts, "figures": figures}


def widen_balanced(found: dict[str, Estimate]) -> dict[str, Estimate]:
    """The figures, with the mean of the bounds of both sides where a side is right always or never.

    Resamples of such a side are all alike, however few pairs it has.
    """
    sides = [found["accuracy/chosen_longer"], found["accuracy/chosen_shorter"]]
    bounds = [side.bounds for side in sides if side.bounds is not None]
    if len(bounds) == 2 and any(side.value in (0.0, 1.0) for side in sides):
        low, high = (sum(ends) / 2 for ends in zip(*bounds, strict=True))
        found[BALANCED] = Estimate(found[BALANCED].value, low, high)
    return found


def mean_of_subsets(is_right: Floats, labels: NDArray[Any], names: Sequence[str]) -> Statistic:
    """The mean of the subsets' accuracies, each of which counts alike."""
    inside = np.stack([labels == name for name in names], axis=1).astype(np.float64)
    count = len(names)
    return Statistic(
        np.concatenate([inside * is_right[:, None], inside], axis=1),
        lambda sums: mean_if_defined(divide(sums[..., :count], sums[..., count:])),
    )


def mean_if_defined(values: Floats) -> Floats:
    """The mean along the last axis without NaN; NaN where there is nothing else."""
    is_there = ~np.isnan(values)
    return divide(np.where(is_there, values, 0.0).sum(axis=-1), is_there.sum(axis=-1).astype(np.float64))


def describe_bins(bins: Sequence[Bin], pairs: PairScores, resampling: Resampling) -> list[dict[str, Any]]:
    """Edges, number of pairs, accuracy and mean confidence `σ(|margin|)` of each bin."""
    accuracies = {str(k): share_of(pairs.is_right, one.is_inside) for k, one in enumerate(bins)}
    found = resampling.estimate(accuracies)
    confidence = sigmoid(np.abs(pairs.margin))
    return [
        {
            "low": one.low,
            "high": one.high,
            "pairs": one.count,
            "accuracy": found[str(k)].as_dict(),
            "confidence": float(confidence[one.is_inside].mean()) if one.count else None,
        }
        for k, one in enumerate(bins)
    ]


def as_json(found: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
    return {name: one.as_dict() for name, one in found.items()}
