"""From scores of tokens to what the losses of pairs look at."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpo_wrapper.batches.sequences import PreferenceBatch, ScoredSequences
from dpo_wrapper.batches.token_level import desensitized, prompted_log_probs, weighted_by_policy
from dpo_wrapper.losses import PairLogProbs, RunningGap
from dpo_wrapper.running import GapState


@dataclass(frozen=True)
class Reading:
    """How a policy's scores of a batch are read, beside the reference's.

    `reference` holds sums per sequence, `ref_scores` single tokens where `ld_alpha` is below 1. With
    `prompted`, the chosen sequences of valid pairs are scored once more with their prompts.
    """

    batch: PreferenceBatch
    reference: Float[Tensor, "s"] | None
    ref_scores: Float[Tensor, "t"] | None = None
    gap: GapState | None = None
    prompted: bool = False
    ld_alpha: float = 1.0

    @cached_property
    def sequences(self) -> ScoredSequences:
        """What the policy has to score."""
        plain = self.batch.sequences
        return plain.beside_whole(self.chosen) if self.prompted else plain

    @property
    def chosen(self) -> Int[Tensor, "p"]:
        return self.batch.pairs[self.batch.valid, 0]

    @property
    def links(self) -> Int[Tensor, "k 2"]:
        """Which of the sequences meet in a pair's loss."""
        pairs, chosen = self.batch.pairs, self.chosen
        if not self.prompted:
            return pairs
        whole = torch.arange(len(chosen), device=chosen.device) + len(self.batch.sequences.length)
        return torch.cat([pairs, torch.stack([chosen, whole], dim=1)])

    def pairs(self, scores: Float[Tensor, "t"], log_sum_p2: Float[Tensor, "t"] | None = None) -> PairLogProbs:
        """Of the scores of all of `sequences`; with `log_sum_p2` pairs are weighted as WPO has it."""
        batch, tokens = self.batch, len(self.batch.sequences.row)
        policy = self.sequences.sums(scores)
        count = len(batch.sequences.length)
        gap = None if self.gap is None else self.gap.now(policy)
        pairs = pair_log_probs(batch, policy[:count], self.reference, gap)
        if self.prompted:
            pairs = replace(pairs, prompted=prompted_log_probs(batch, policy[count:]))
        if self.ld_alpha < 1:
            pairs = desensitized(pairs, batch, self.ld_alpha, scores[:tokens], self.ref_scores)
        if log_sum_p2 is not None:
            pairs = weighted_by_policy(pairs, batch, scores[:tokens], log_sum_p2[:tokens])
        return pairs


def pair_log_probs(
    batch: PreferenceBatch,
    policy: Float[Tensor, "s"],
    reference: Float[Tensor, "s"] | None,
    gap: RunningGap | None = None,
) -> PairLogProbs:
    """Sums per sequence as sums per valid pair, with what the data says of these."""
    valid = batch.valid
    chosen, rejected = batch.pairs[valid].unbind(dim=-1)
    lengths = batch.sequences.length
    if batch.step_pairs is not None and batch.step_chosen_tokens is not None:
        mean_length = policy.new_tensor(batch.step_chosen_tokens / max(1, batch.step_pairs))
    else:
        mean_length = lengths[chosen].to(policy.dtype).sum() / max(1, len(chosen))
    return PairLogProbs(
        chosen=policy[chosen],
        rejected=policy[rejected],
        ref_chosen=None if reference is None else reference[chosen].to(policy.dtype),
        ref_rejected=None if reference is None else reference[rejected].to(policy.dtype),
        chosen_length=lengths[chosen],
        rejected_length=lengths[rejected],
        mean_chosen_length=mean_length,
        margins=None if batch.margins is None else batch.margins[valid].to(policy.dtype),
        pair_weights=None if batch.pair_weights is None else batch.pair_weights[valid].to(policy.dtype),
        gap=gap,
    )
