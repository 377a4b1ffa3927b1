"""Batches of supervised fine-tuning."""

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Bool
from torch import Tensor

from dpo_wrapper.batches.batch import Batch
from dpo_wrapper.batches.sequences import SequenceLogProbs


@dataclass(frozen=True)
class SFTBatch(Batch):
    """Sequences whose scored tokens the model learns to write; `step_count` counts these tokens."""

    dataset_type: ClassVar[str] = "prompt_completion"

    @property
    def valid(self) -> Bool[Tensor, "t"]:
        """All scored tokens: each has a term of its own in the loss."""
        return self.sequences.row >= 0

    def log_probs(self, policy: SequenceLogProbs, reference: SequenceLogProbs | None = None) -> Any:
        """The log-prob of each scored token."""
        return policy.tokens
