"""Bootstrap intervals of numbers that are functions of sums over examples, resampled by prompt.

Answers to one prompt resemble each other, so that prompts and not rows are drawn anew. Intervals are BCa
(bias-corrected and accelerated; Efron 1987, "Better Bootstrap Confidence Intervals"; DiCiccio and Efron 1996,
"Bootstrap Confidence Intervals", eq. 2.3, 2.8 and 6.6). Their coverage is right to second order, where
percentile intervals are shifted for skewed numbers such as shares near 0 or 1, perplexities and calibration
errors. The acceleration is that of the jackknife over prompts.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CHUNK_SIZE = 1 << 22
"""Numbers of a table of resampled counts that are held at once."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; None where it is not defined, or where nothing can be said of it."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @property
    def bounds(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)

    def as_dict(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Statistic:
    """A number that depends on the sums of columns over the examples.

    Attributes:
        columns: Float[n, k], the summands of each example.
        compute: from Float[..., k] sums to Float[...]; NaN where it is not defined.
        is_share: whether it is the first column over the second, a share of examples that something holds of.
    """

    columns: Floats
    compute: Callable[[Floats], Floats]
    is_share: bool = False


def ratio(numerator: Floats, denominator: Floats, *, is_share: bool = False) -> Statistic:
    """The sum of one column over that of another: a mean, where the other one is 1 or a choice of rows."""
    return Statistic(
        np.stack(np.broadcast_arrays(numerator, denominator), axis=-1).astype(np.float64),
        lambda sums: divide(sums[..., 0], sums[..., 1]),
        is_share,
    )


def mean_of(values: Floats) -> Statistic:
    return ratio(values, np.ones_like(values))


def share_of(is_so: Floats, is_inside: NDArray[Any] | None = None) -> Statistic:
    """The share of examples that something holds of, among all or among those inside."""
    inside = np.ones_like(is_so) if is_inside is None else is_inside.astype(np.float64)
    return ratio(is_so * inside, inside, is_share=True)


def divide(numerator: Floats, denominator: Floats) -> Floats:
    """The quotient; NaN where nothing is divided by nothing."""
    safe = np.where(denominator == 0, 1.0, denominator)
    return np.where(denominator == 0, np.nan, numerator / safe)


def estimate(
    statistics: Mapping[str, Statistic],
    groups: NDArray[np.int64],
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Each number with its interval, all from the same resamples.

    A share of 0 or 1, which is the same in all resamples, has the interval of `bound_constant`.

    Args:
        statistics: over the same `n` examples, of which there is at least one.
        groups: Int[n], equal for examples of one prompt, which are drawn together.
        num_resamples: number of times that as many prompts are drawn with replacement.
        confidence: share of the intervals that should hold the true number.
        seed: of the draws.
    """
    _, group = np.unique(groups, return_inverse=True)
    num_groups = int(group.max()) + 1
    names, widths = list(statistics), [one.columns.shape[1] for one in statistics.values()]
    table = np.concatenate([one.columns for one in statistics.values()], axis=1)
    sums = np.zeros((num_groups, table.shape[1]))
    np.add.at(sums, group, table)
    drawn = np.concatenate([counts @ sums for counts in draw_counts(num_groups, num_resamples, seed)])
    total = sums.sum(axis=0)
    estimates, start = {}, 0
    for name, width in zip(names, widths, strict=True):
        part = slice(start, start + width)
        compute = statistics[name].compute
        values = (compute(total[None, part])[0], compute(drawn[:, part]), compute((total - sums)[:, part]))
        estimates[name] = found = find_interval(*values, confidence)
        if statistics[name].is_share and found.value in (0.0, 1.0):
            num_inside = int(np.count_nonzero(sums[:, start + 1]))
            estimates[name] = bound_constant(found.value, num_inside, confidence)
        start += width
    return estimates


def bound_constant(
    value: float, num_groups: int, confidence: float, limits: tuple[float, float] = (0.0, 1.0)
) -> Estimate:
    """The mean of values that are the same for so many independent prompts, with its exact interval.

    Others may have any value within the limits. Were they more than a share of
    `1 - ((1 - confidence) / 2)^(1/n)` of all, the `n` would hold one of them with a probability above
    `(1 + confidence) / 2`. For a share of 0 or 1 this is the interval of Clopper and Pearson.
    """
    others = 1 - ((1 - confidence) / 2) ** (1 / num_groups)
    low, high = (value + others * (limit - value) for limit in limits)
    return Estimate(value, low, high)


def draw_counts(num_groups: int, num_resamples: int, seed: int) -> Iterator[Floats]:
    """How often each group is drawn in each resample, Float[b, g], some resamples at a time."""
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK_SIZE // num_groups)
    for start in range(0, num_resamples, step):
        size = min(step, num_resamples - start)
        drawn = rng.integers(num_groups, size=(size, num_groups))
        drawn += num_groups * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * num_groups)
        yield counts.reshape(size, num_groups).astype(np.float64)


def find_interval(value: float, resampled: Floats, left_out: Floats, confidence: float = 0.95) -> Estimate:
    """The BCa interval of a number.

    Args:
        value: the number.
        resampled: Float[b], the number in each resample.
        left_out: Float[g], the number without each group.
        confidence: as in `estimate`.
    """
    if not np.isfinite(value):
        return Estimate(None)
    resampled, left_out = (values[np.isfinite(values)] for values in (resampled, left_out))
    if len(left_out) < 2 or not len(resampled):
        return Estimate(float(value))
    normal = NormalDist()
    is_equal = np.isclose(resampled, value, rtol=1e-9, atol=1e-12)
    share = float(np.mean(np.where(is_equal, 0.5, resampled < value)))
    limit = 0.5 / len(resampled)
    bias = normal.inv_cdf(min(max(share, limit), 1 - limit))
    influence = left_out.mean() - left_out
    spread = float((influence**2).sum()) ** 1.5
    acceleration = float((influence**3).sum()) / (6 * spread) if spread > 1e-300 else 0.0
    bounds = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        z = bias + normal.inv_cdf(tail)
        level = normal.cdf(bias + z / max(1 - acceleration * z, 1e-6))
        bounds.append(float(np.quantile(resampled, level)))
    return Estimate(float(value), *bounds)
