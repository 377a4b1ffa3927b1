"""Scores of pairs, and the figures that are made of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpo_wrapper.data import TokenizedExample
from dpo_wrapper.evaluation.completion_scores import CompletionScores
from dpo_wrapper.evaluation.statistics.bootstrap import Floats, Statistic, divide, mean_of, ratio, share_of
from dpo_wrapper.metrics import Rewards


@dataclass(frozen=True)
class PairScores:
    """Scores of `n` pairs.

    Attributes:
        chosen, rejected: of the two sides, `n` completions each.
    """

    chosen: CompletionScores
    rejected: CompletionScores

    @classmethod
    def from_completions(cls, scores: CompletionScores) -> "PairScores":
        """Of completions that come in pairs, the chosen one first."""
        return cls(scores[0::2], scores[1::2])

    def __len__(self) -> int:
        return len(self.margin)

    @property
    def margin(self) -> Floats:
        """Float[n], reward of chosen minus that of rejected."""
        return self.chosen.reward - self.rejected.reward

    @property
    def is_right(self) -> Floats:
        """Float[n], 1 where chosen has the larger reward, and a half for ties within rounding."""
        sides = (self.chosen, self.rejected)
        chosen, rejected = (
            Rewards(torch.from_numpy(side.reward), torch.from_numpy(side.rounding)) for side in sides
        )
        return chosen.is_ahead_of(rejected).numpy()

    @property
    def length_difference(self) -> NDArray[np.int64]:
        """Int[n], scored tokens of chosen minus those of rejected."""
        return self.chosen.length - self.rejected.length

    def as_records(
        self,
        examples: Sequence[TokenizedExample],
        prompts: NDArray[np.int64],
        subsets: Sequence[str | None],
    ) -> list[dict[str, Any]]:
        """The lines of scores.jsonl, by the names of metrics; `prompt` is equal for pairs of one prompt."""
        columns: dict[str, Any] = {}
        for side in ("chosen", "rejected"):
            scores: CompletionScores = getattr(self, side)
            columns |= {f"rewards/{side}": scores.reward, f"logps/{side}": scores.policy}
            if scores.reference is not None:
                columns[f"logps/ref_{side}"] = scores.reference
            columns[f"length/{side}"] = scores.length
        columns |= {"rewards/margins": self.margin, "rewards/accuracies": self.is_right}
        values = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [
            {"source": example.source, "prompt": f"{prompt & (1 << 64) - 1:016x}"}
            | ({} if subset is None else {"subset": subset})
            | dict(zip(columns, row, strict=True))
            for example, prompt, subset, row in zip(examples, prompts.tolist(), subsets, values, strict=True)
        ]


def reward_statistics(pairs: PairScores) -> dict[str, Statistic]:
    """Accuracy, rewards and margin, each a mean over pairs."""
    return {
        "rewards/accuracies": share_of(pairs.is_right),
        "rewards/margins": mean_of(pairs.margin),
        "rewards/chosen": mean_of(pairs.chosen.reward),
        "rewards/rejected": mean_of(pairs.rejected.reward),
    }


def log_prob_statistics(pairs: PairScores) -> dict[str, Statistic]:
    """Log-probs of both sides, perplexities, and how far they have moved from the reference."""
    statistics: dict[str, Statistic] = {}
    for side in ("chosen", "rejected"):
        scores: CompletionScores = getattr(pairs, side)
        length = scores.length.astype(np.float64)
        statistics[f"logps/{side}"] = mean_of(scores.policy)
        statistics[f"perplexity/{side}"] = perplexity(scores.policy, length)
        statistics[f"length/{side}"] = mean_of(length)
        if scores.reference is not None:
            change = scores.policy - scores.reference
            statistics[f"logps/ref_{side}"] = mean_of(scores.reference)
            statistics[f"perplexity/ref_{side}"] = perplexity(scores.reference, length)
            statistics[f"logratios/{side}"] = mean_of(change)
            statistics[f"logratios/{side}_per_token"] = ratio(change, length)
    return statistics


def perplexity(log_probs: Floats, length: Floats) -> Statistic:
    """`exp(-Σ log p / Σ n)`, over all tokens of all completions."""
    mean = ratio(-log_probs, length)
    return Statistic(mean.columns, lambda sums: np.exp(mean.compute(sums)))


def length_statistics(pairs: PairScores) -> dict[str, Statistic]:
    """Whether it is length alone: how often the longer answer is chosen, and accuracy with lengths balanced.

    The balanced accuracy is the mean of those of pairs whose chosen answer is longer and of pairs whose
    chosen answer is shorter: one half for rewards that depend on length alone.
    """
    difference, is_right = pairs.length_difference, pairs.is_right
    is_longer, is_shorter = ((difference > 0) * 1.0, (difference < 0) * 1.0)
    longer_wins = np.where(difference == 0, 0.5, is_longer)
    balanced = np.stack([is_right * is_longer, is_longer, is_right * is_shorter, is_shorter], axis=1)
    return {
        "length/longer_wins": share_of(longer_wins),
        "length/shorter_wins": share_of(1 - longer_wins),
        "accuracy/chosen_longer": share_of(is_right, is_longer),
        "accuracy/chosen_shorter": share_of(is_right, is_shorter),
        "accuracy/lengths_balanced": Statistic(
            balanced,
            lambda sums: 0.5 * (divide(sums[..., 0], sums[..., 1]) + divide(sums[..., 2], sums[..., 3])),
        ),
    }
