"""Batches of ranked lists of completions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from beartype import beartype
from einops import rearrange
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dpo_wrapper.batches.batch import Batch
from dpo_wrapper.batches.preference import PreferenceBatch
from dpo_wrapper.batches.sequences import Ids, ScoredSequences, SequenceLogProbs
from dpo_wrapper.losses.inputs import RankedLogProbs


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class RankedBatch(Batch):
    """Sequences, and lists of them: row `l` of `ranks` holds the indices of a list, the best first, then -1.

        ranks   0  1  2     sequences 0 to 2 answer one prompt, 0 the best of them
                3  4 -1     3 and 4 another

    Attributes:
        weights: factors of the lists' losses.
    """

    dataset_type: ClassVar[str] = "ranked"

    ranks: Int[Tensor, "l k"]
    weights: Float[Tensor, "l"] | None = None

    @classmethod
    def from_lists(
        cls,
        prompts: Sequence[Ids],
        completions: Sequence[Sequence[Ids]],
        weights: Float[Tensor, "l"] | None = None,
        scored: Sequence[Sequence[bool] | None] | None = None,
    ) -> "RankedBatch":
        """A list of completions for each prompt, the best first, all as token ids.

        `scored` is as in `ScoredSequences.from_lists`, for the completions of all lists one after another.
        """
        if len(prompts) != len(completions):
            sizes = f"{len(completions)} lists for {len(prompts)} prompts"
            raise ValueError(
                f"there should be a list of completions for each prompt, but there are {sizes}: add one."
            )
        sequences = ScoredSequences.from_lists(
            [prompt for prompt, ranked in zip(prompts, completions, strict=True) for _ in ranked],
            [ids for ranked in completions for ids in ranked],
            scored,
        )
        rows = torch.arange(len(sequences.length)).split([len(ranked) for ranked in completions])
        return cls(sequences, pad_sequence(rows, batch_first=True, padding_value=-1), weights)

    @property
    def is_real(self) -> Bool[Tensor, "l k"]:
        """Where there is a completion with a scored token."""
        return (self.ranks >= 0) & (self.sequences.length[self.ranks.clamp(min=0)] > 0)

    @property
    def valid(self) -> Bool[Tensor, "l"]:
        """Lists that rank at least two completions with a scored token."""
        return self.is_real.sum(dim=-1) > 1

    @property
    def linked_sequences(self) -> Int[Tensor, "q 2"]:
        """The best of each list with each of its completions."""
        best = self.ranks[:, :1].expand_as(self.ranks)
        return torch.stack([best, self.ranks], dim=-1)[self.ranks >= 0]

    def log_probs(self, policy: SequenceLogProbs, reference: SequenceLogProbs | None) -> RankedLogProbs:
        """The log-probs of the valid lists."""
        dtype = policy.sums.dtype
        ranks = self.select_valid(self.ranks.clamp(min=0))
        return RankedLogProbs(
            policy=policy.sums[ranks],
            reference=None if reference is None else reference.sums[ranks].to(dtype),
            is_real=self.select_valid(self.is_real),
            length=self.sequences.length[ranks],
            weights=None if self.weights is None else self.select_valid(self.weights).to(dtype),
        )

    def to_preference_batch(self, ranking: Literal["all", "best"] = "all") -> PreferenceBatch:
        """The lists as pairs: all of them, or the best completion with each of the others.

        Each sequence is scored once, however many pairs it stands in, and each pair has its list's weight.
        """
        if ranking not in ("all", "best"):
            raise ValueError(f"ranking should be 'all' or 'best', but it is {ranking!r}: choose one.")
        k = self.ranks.shape[1]
        better, worse = torch.triu_indices(k, k, offset=1, device=self.ranks.device)
        if ranking == "best":
            better, worse = better[better == 0], worse[better == 0]
        sides = torch.stack([self.ranks[:, better], self.ranks[:, worse]])
        pair_index = rearrange(sides, "side l q -> (l q) side")
        exists = (pair_index >= 0).all(dim=-1)
        weights = None if self.weights is None else self.weights.repeat_interleave(len(better))[exists]
        return PreferenceBatch(self.sequences, pair_index[exists], weights)
