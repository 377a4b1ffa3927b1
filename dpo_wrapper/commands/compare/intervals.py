"""Bootstrap intervals of what several runs, with several seeds, score on the same pairs.

A mean over runs and pairs varies with both: another seed would have trained another model, and other prompts
would have been answered otherwise. Both are drawn anew, each for itself, as Owen 2007 ("The pigeonhole
bootstrap", arXiv 0712.1111) does with crossed factors; such intervals are somewhat wide rather than narrow.
With few seeds they know little of how much seeds differ, and with a single one nothing. All contestants share
the seeds and prompts that are drawn, so that what they have in common cancels in their differences.
"""

from collections.abc import Callable, Sequence

import numpy as np

from dpo_wrapper.evaluation.statistics.bootstrap import Estimate, Floats, bound_certain_share, draw_counts

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95

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
        """The mean of a table, with its percentile interval.

        A share of 0 or 1 is the same in all resamples, and has the interval of `bound_certain_share`.
        """
        found = self._estimate(lambda draw: draw(table))
        if is_share and found.bounds is not None and found.value in (0.0, 1.0):
            return bound_certain_share(found.value, self.prompt_counts.shape[1], CONFIDENCE)
        return found

    def estimate_difference(self, first: Table, second: Table) -> Estimate:
        """The mean of one table less that of another, whose seeds and pairs are the same."""
        return self._estimate(lambda draw: draw(first) - draw(second))

    def _estimate(self, combine: Callable[[Callable[[Table], Floats]], Floats]) -> Estimate:
        value = float(combine(lambda table: np.asarray(np.nanmean(table))))
        draws = combine(self.draw_means)
        is_alone = self.prompt_counts.shape[1] < 2  # nothing is known of other prompts
        if is_alone or not np.isfinite(draws).any():
            return Estimate(value)
        tail = (1 - CONFIDENCE) / 2
        low, high = np.nanquantile(draws, (tail, 1 - tail))
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
