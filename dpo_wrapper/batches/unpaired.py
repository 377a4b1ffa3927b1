"""Batches of completions with a label each, and prompts with completions of other prompts."""

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from beartype import beartype
from jaxtyping import Bool, Float, jaxtyped
from torch import Tensor

from dpo_wrapper.batches.batch import Batch
from dpo_wrapper.batches.sequences import Ids, ScoredSequences, SequenceLogProbs
from dpo_wrapper.losses.inputs import UnpairedLogProbs


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class UnpairedBatch(Batch):
    """Completions with a label each, and the sequences by which `KTO` estimates the KL divergence.

    Attributes:
        kl_sequences: each prompt with the completion of another prompt. They tell how far the policy is from
            the reference.
        label: True for a desirable completion, False for an undesirable one.
        weights: factors of the rows' losses.
        step_kl: estimate of the KL divergence in nats over the whole step; without it `DPO` makes one from
            this batch alone.
    """

    dataset_type: ClassVar[str] = "unpaired_preference"
    needs_kl: ClassVar[bool] = True

    kl_sequences: ScoredSequences
    label: Bool[Tensor, "s"]
    weights: Float[Tensor, "s"] | None = None
    step_kl: Float[Tensor, ""] | None = None

    @classmethod
    def from_lists(
        cls,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        labels: Sequence[bool],
        kl_completions: Sequence[Ids] | None = None,
        weights: Float[Tensor, "s"] | None = None,
        scored: Sequence[Sequence[bool] | None] | None = None,
    ) -> "UnpairedBatch":
        """One completion and one label for each prompt, all as token ids.

        `kl_completions` are, for each prompt, a completion of another one; an empty one does not count.
        Without them they are taken from the batch itself. `scored` is as in `ScoredSequences.from_lists`.
        """
        if not len(prompts) == len(completions) == len(labels):
            sizes = f"{len(prompts)}, {len(completions)} and {len(labels)}"
            raise ValueError(
                f"prompts, completions and labels should be as many, but there are {sizes}: add the others."
            )
        if not all(isinstance(label, bool) for label in labels):
            raise TypeError("labels should be True or False, but one is something else: give one bool a row.")
        if kl_completions is None:
            partner_indices = kl_partner_indices([tuple(prompt) for prompt in prompts])
            if all(partner is None for partner in partner_indices):
                raise ValueError(
                    "rows should be of two prompts or more, so that each gets a completion of another, but "
                    "there is only one: make batches larger, or give kl_completions."
                )
            kl_completions = [() if partner is None else completions[partner] for partner in partner_indices]
        elif len(kl_completions) != len(prompts):
            sizes = f"{len(kl_completions)} for {len(prompts)} prompts"
            raise ValueError(
                f"there should be a KL completion for each prompt, but there are {sizes}: add one."
            )
        kl_sequences = ScoredSequences.from_lists(prompts, kl_completions)
        sequences = ScoredSequences.from_lists(prompts, completions, scored)
        return cls(sequences, kl_sequences, torch.tensor(list(labels)), weights)

    @property
    def valid(self) -> Bool[Tensor, "s"]:
        return self.sequences.length > 0

    def with_kl(self, sums: Float[Tensor, "2"]) -> "UnpairedBatch":
        """The same rows with the KL estimate `sums[0] / sums[1]`, from the sum of `DPO.kl_sums`."""
        return self.replace(step_kl=sums[0] / sums[1].clamp(min=1))

    def log_probs(self, policy: SequenceLogProbs, reference: SequenceLogProbs | None) -> UnpairedLogProbs:
        """The log-probs of the valid rows; the batch should have its KL estimate (`with_kl`)."""
        assert self.step_kl is not None
        select, dtype = self.select_valid, policy.sums.dtype
        return UnpairedLogProbs(
            policy=select(policy.sums),
            reference=None if reference is None else select(reference.sums).to(dtype),
            label=select(self.label),
            kl=self.step_kl.to(dtype),
            length=select(self.sequences.length),
            weights=None if self.weights is None else select(self.weights).to(dtype),
        )


def kl_partner_indices(prompts: Sequence[Hashable], seed: int = 0) -> list[int | None]:
    """For each row the index of a row with another prompt, whose completion it gets for the KL estimate.

    Each row gives its completion to one other row. Only if one prompt has more than half of all rows, some of
    them find no partner and get None.

        prompts   a  a  b  c        the rows are sorted by prompt, prompts shuffled by the seed, and shifted
        partner   2  3  0  1        by as many places as the most frequent prompt has rows
    """
    rows_of_prompt: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of_prompt.setdefault(prompt, []).append(row)
    groups = list(rows_of_prompt.values())
    random.Random(seed).shuffle(groups)
    order = [row for group in groups for row in group]
    offset = max(map(len, groups), default=0)
    partner_indices: list[int | None] = [None] * len(order)
    for place, row in enumerate(order):
        partner = order[(place + offset) % len(order)]
        partner_indices[row] = partner if prompts[partner] != prompts[row] else None
    return partner_indices
