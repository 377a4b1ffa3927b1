"""Batches of supervised fine-tuning."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from jaxtyping import Bool, Int
from torch import Tensor

from dpo_wrapper.batches.batch import Batch
from dpo_wrapper.batches.sequences import ScoredSequences, SequenceLogProbs


@dataclass(frozen=True)
class SFTBatch(Batch):
    """Sequences whose scored tokens the model learns to write.

    `step_tokens` is the number of scored tokens in the whole optimizer step, if this batch is a part of it.
    """

    dataset_type: ClassVar[str] = "prompt_completion"

    sequences: ScoredSequences
    step_tokens: int | None = None

    @property
    def valid(self) -> Bool[Tensor, "t"]:
        """All scored tokens: each has a term of its own in the loss."""
        return self.sequences.row >= 0

    @property
    def links(self) -> Int[Tensor, "0 2"]:
        """None: sequences do not meet in a sum over tokens."""
        return self.sequences.row.new_zeros(0, 2)

    @property
    def step_count(self) -> int | None:
        """Number of scored tokens of the whole step."""
        return self.step_tokens

    def with_step_totals(self, *totals: int) -> "SFTBatch":
        """The same sequences as a part of a step with this number of scored tokens."""
        (tokens,) = totals
        return replace(self, step_tokens=tokens)

    def log_probs(self, policy: SequenceLogProbs, reference: SequenceLogProbs | None = None) -> Any:
        """The log-prob of each scored token."""
        return policy.tokens
