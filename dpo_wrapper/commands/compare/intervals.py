"""Bootstrap intervals of what several runs, with several seeds, score on the same pairs.

A mean over runs and pairs varies with both: another seed would have trained another model, and other prompts
would have been answered otherwise. Both are drawn anew, each for itself, as Owen 2007 ("The pigeonhole
bootstrap", arXiv 0712.1111) does with crossed factors; such intervals are somewhat wide rather than narrow.
With few seeds they know little of how much seeds differ, and with a single one nothing. All contestants share
the seeds and prompts that are drawn, so that what they have in common cancels in their differences.

Draws from `n` values never leave their range, which holds the median of what they come from with a
probability of `1 - 2^(1-n)` (Thompson 1936, "On Confidence Ranges for the Median"): 50% for two values, and
over 95% from six on. Fewer prompts have no interval but the exact one of a share that is the same for all.
Percentiles of a few dozen values lie too close together still, which `expand_tail` mends.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

from dpo_wrapper.evaluation.statistics.bootstrap import Estimate, Floats, bound_constant, draw_counts

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
MIN_PROMPTS = 6
"""Prompts from which draws can have an interval of 95%."""

Table = Floats
"""Float[seeds, pairs], one value for each run and pair; NaN where there is none."""


class CrossedBootstrap:
    """Resamples of seeds and prompts.

    Args:
        num_seeds: rows of the tables.
        prompts: of each pair its prompt, by any name; pairs of one prompt are drawn together.
        seed: of the draws.
    """

    def __init__(self, num_seeds: int, prompts: Sequence[str], seed: int = 0) -> None:
        names, self.prompt_of_pair = np.unique(np.asarray(prompts), return_inverse=True)
        self.prompt_counts = np.concatenate(list(draw_counts(len(names), NUM_RESAMPLES, seed)))
        self.seed_counts = np.concatenate(list(draw_counts(num_seeds, NUM_RESAMPLES, seed + 1)))

    def estimate_mean(self, table: Table, *, is_share: bool = False) -> Estimate:
        """The mean of a table, with its interval.

        A share that is the same for all prompts is so in all resamples, and has the interval of
        `bound_constant`.
        """
        return self._estimate(lambda draw: draw(table), (0.0, 1.0) if is_share else None)

    def estimate_difference(self, first: Table, second: Table, *, is_share: bool = False) -> Estimate:
        """The mean of one table less that of another, whose seeds and pairs are the same."""
        return self._estimate(lambda draw: draw(first) - draw(second), (-1.0, 1.0) if is_share else None)

    def _estimate(
        self, combine: Callable[[Callable[[Table], Floats]], Floats], limits: tuple[float, float] | None
    ) -> Estimate:
        value = float(combine(lambda table: np.asarray(np.nanmean(table))))
        draws = combine(self.draw_means)
        draws = draws[np.isfinite(draws)]
        num_prompts = self.prompt_counts.shape[1]
        if num_prompts < 2 or not len(draws):  # of one prompt nothing is known of others
            return Estimate(value)
        if limits is not None and np.ptp(draws) < 1e-9:
            return bound_constant(value, num_prompts, CONFIDENCE, limits)
        if num_prompts < MIN_PROMPTS:
            return Estimate(value)
        tail = expand_tail((1 - CONFIDENCE) / 2, num_prompts)
        low, high = np.quantile(draws, (tail, 1 - tail))
        return Estimate(value, float(low), float(high))

    def draw_means(self, table: Table) -> Floats:
        """The mean of a table in each resample; NaN where a resample has no value."""
        is_known = ~np.isnan(table)
        sums, counts = (self._sum_draws(values) for values in (np.where(is_known, table, 0.0), is_known))
        return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)

    def _sum_draws(self, values: Table) -> Floats:
        num_prompts = self.prompt_counts.shape[1]
        by_prompt = np.stack([np.bincount(self.prompt_of_pair, row, num_prompts) for row in values])
        return np.einsum("ds,dg,sg->d", self.seed_counts, self.prompt_counts, by_prompt, optimize=True)


def expand_tail(tail: float, count: int) -> float:
    """The share of draws beyond an end of the interval of so many values, for this share of other means.

    Hesterberg 2015, "What Teachers Should Know About the Bootstrap" (arXiv 1411.5279), the expanded
    percentile interval: `Φ(-t √(n / (n - 1)))`, with the quantile `t` of Student's distribution of `n - 1`
    degrees of freedom, here by its expansion (Abramowitz and Stegun 1964, 26.7.5).
    """
    normal, degrees = NormalDist(), count - 1
    z = -normal.inv_cdf(tail)
    t = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    return normal.cdf(-t * math.sqrt(count / degrees))
