"""What all batches have in common, and the totals of an optimizer step that takes several batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dpo_wrapper.batches.sequences import ScoredSequences, SequenceLogProbs
from dpo_wrapper.tensor_dataclass import TensorDataclass

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over processes."""
B = TypeVar("B", bound="Batch")


@dataclass(frozen=True)
class Batch(TensorDataclass, ABC):
    """Sequences, and how they meet in a loss.

    Attributes:
        step_denominator: number of valid pairs (lists, rows, SFT's tokens) of the optimizer step, if it takes
            several batches. Losses are divided by it, so that they add up to the step's loss.
    """

    dataset_type: ClassVar[str]
    needs_kl: ClassVar[bool] = False  # whether its loss needs an estimate of the KL divergence (`with_kl`)

    sequences: ScoredSequences
    step_denominator: int | None = field(default=None, kw_only=True)

    def check(self) -> None:
        """Raise TypeError or ValueError if what the batch holds does not fit together."""

    @property
    @abstractmethod
    def valid(self) -> Bool[Tensor, "_"]:
        """Which pairs (lists, rows) have enough scored tokens to enter the loss."""

    @property
    def valid_index(self) -> Int[Tensor, "_"]:
        """Indices of the valid pairs (lists, rows), made once and without waiting for a device."""
        if "_valid_index" not in vars(self):
            index = self.on_cpu.valid.nonzero()[:, 0]
            vars(self)["_valid_index"] = index.to(self.sequences.ids.device, non_blocking=True)
        return vars(self)["_valid_index"]

    def select_valid(self, values: Tensor) -> Tensor:
        """The values of the valid pairs (lists, rows)."""
        index = self.valid_index
        return values if len(index) == len(values) else values.index_select(0, index)

    @property
    def linked_sequences(self) -> Int[Tensor, "k 2"]:
        """Indices of sequences that meet in one value of the loss, two a row; none unless a batch says so."""
        return self.sequences.row.new_zeros(0, 2)

    @abstractmethod
    def log_probs(self, policy: SequenceLogProbs, reference: SequenceLogProbs | None) -> Any:
        """The log-probs of the valid pairs (lists, rows), as losses take them."""

    @property
    def denominator(self) -> int:
        """What the sum of the losses is divided by."""
        return max(1, len(self.valid_index) if self.step_denominator is None else self.step_denominator)

    @property
    def share_of_step(self) -> float:
        """The share of the step's valid pairs (lists, rows) that this batch has; 0 where none is valid."""
        return len(self.valid_index) / self.denominator

    def step_totals(self) -> tuple[int, ...]:
        """What this batch adds to the totals of its step."""
        return (len(self.valid_index),)

    def with_step_totals(self: B, *totals: int) -> B:
        """The same batch in a step with these sums of `step_totals` over its batches."""
        (count,) = totals
        return self.replace(step_denominator=count)

    def with_kl(self: B, sums: Float[Tensor, "2"]) -> B:
        """The same batch with the step's estimate of the KL divergence, from the sum of `DPO.kl_sums`."""
        return self

    def given_log_probs(self, ref_log_probs: object) -> SequenceLogProbs:
        """Given reference log-probs by sequence; TypeError where the batch holds no pairs."""
        name = type(self).__name__
        raise TypeError(f"ref_log_probs are for pairs, but the batch is a {name}: leave them out.")


@dataclass(frozen=True)
class SFTBatch(Batch):
    """Sequences whose scored tokens the model learns to write; each token is a term of the loss."""

    dataset_type: ClassVar[str] = "prompt_completion"

    @property
    def valid(self) -> Bool[Tensor, "t"]:
        return self.sequences.row >= 0

    def log_probs(self, policy: SequenceLogProbs, reference: SequenceLogProbs | None = None) -> Any:
        return policy.tokens


def normalize_over_step(
    batches: Sequence[B],
    reduce: Reduce | None = None,
    kl_sums: Callable[[B], Float[Tensor, "2"]] | None = None,
) -> list[B]:
    """Attach the step's totals to each micro-batch, so that their losses add up to the loss of the step.

    All are of one class, and each process has at least one. `kl_sums` is that of `DPO`, if `needs_kl`.
    """
    reduce = reduce or (lambda sums: sums)
    device = batches[0].sequences.ids.device
    totals = reduce(torch.tensor([batch.step_totals() for batch in batches], device=device).sum(dim=0))
    parts = [batch.with_step_totals(*totals.tolist()) for batch in batches]
    if not batches[0].needs_kl:
        return parts
    assert kl_sums is not None
    sums = reduce(torch.stack([kl_sums(batch) for batch in batches]).sum(dim=0))
    return [part.with_kl(sums) for part in parts]
