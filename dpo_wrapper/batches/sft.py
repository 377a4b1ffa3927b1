"""A batch of supervised training: whole sequences, every token of which but the first is scored."""

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_wrapper.batches.sequences import Ids, ScoredSequences
from dpo_wrapper.tensor_dataclass import Movable


@dataclass(frozen=True)
class SFTBatch(Movable):
    """Sequences, and the number of tokens that are scored in the whole optimizer step."""

    sequences: ScoredSequences
    step_tokens: int = 1

    @classmethod
    def from_lists(cls, sequences: Sequence[Ids]) -> "SFTBatch":
        """Whole sequences of token ids."""
        return cls(ScoredSequences.from_lists([()] * len(sequences), sequences))
