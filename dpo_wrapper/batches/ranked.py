"""Batches of other data than pairs, for `dpo(batch)`: ranked lists, and single rows with a label."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from beartype import beartype
from einops import rearrange
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dpo_wrapper.batches.sequences import Ids, PreferenceBatch, ScoredSequences
from dpo_wrapper.batches.unpaired import partners
from dpo_wrapper.losses import RankedLogProbs, UnpairedLogProbs
from dpo_wrapper.metrics import list_metrics, row_metrics
from dpo_wrapper.tensor_dataclass import TensorDataclass

Score = Callable[[ScoredSequences], Tensor]
ScoreOrNone = Callable[[ScoredSequences], Tensor | None]


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class RankedBatch(TensorDataclass):
    """Sequences, and lists of them: row `l` of `ranks` holds the indices of a list, the best first, then -1.

        ranks   0  1  2     sequences 0 to 2 answer one prompt, 0 the best of them
                3  4 -1     3 and 4 another

    `weights` multiply the lists' losses. `step_lists` counts the valid lists of a whole optimizer step, where
    this batch is a part of it.
    """

    sequences: ScoredSequences
    ranks: Int[Tensor, "l k"]
    weights: Float[Tensor, "l"] | None = None
    step_lists: int | None = None

    @classmethod
    def from_lists(
        cls,
        prompts: Sequence[Ids],
        completions: Sequence[Sequence[Ids]],
        weights: Float[Tensor, "l"] | None = None,
    ) -> "RankedBatch":
        """A list of completions, the best first, for each prompt, all as token ids."""
        if len(prompts) != len(completions):
            counts = f"{len(prompts)} and {len(completions)}"
            raise ValueError(f"each prompt needs a list of completions, but there are {counts}.")
        owners = [x for x, ranked in zip(prompts, completions, strict=True) for _ in ranked]
        sequences = ScoredSequences.from_lists(owners, [y for ranked in completions for y in ranked])
        ends = torch.tensor([len(ranked) for ranked in completions]).cumsum(dim=0).tolist()
        rows = [torch.arange(end - len(ranked), end) for ranked, end in zip(completions, ends, strict=True)]
        return cls(sequences, pad_sequence(rows, batch_first=True, padding_value=-1), weights)

    @property
    def real(self) -> Bool[Tensor, "l k"]:
        """Where there is a completion with a scored token."""
        return (self.ranks >= 0) & (self.sequences.length[self.ranks.clamp(min=0)] > 0)

    @property
    def valid(self) -> Bool[Tensor, "l"]:
        """Lists that rank at least two completions."""
        return self.real.sum(dim=-1) > 1

    def prepared(self, policy: Score, reference: ScoreOrNone) -> "RankedBatch":
        """With whatever else has to be scored before its sequences; nothing."""
        return self

    @property
    def links(self) -> Int[Tensor, "q 2"]:
        """Sequences that meet in a loss."""
        best = self.ranks[:, :1].expand_as(self.ranks)
        return torch.stack([best, self.ranks], dim=-1)[self.ranks >= 0]

    def log_probs(self, policy: Float[Tensor, "s"], reference: Float[Tensor, "s"] | None) -> RankedLogProbs:
        """Of the valid lists, from sums per sequence."""
        valid = self.valid
        ranks = self.ranks.clamp(min=0)[valid]
        return RankedLogProbs(
            policy=policy[ranks],
            reference=None if reference is None else reference[ranks].to(policy.dtype),
            real=self.real[valid],
            length=self.sequences.length[ranks],
            weights=None if self.weights is None else self.weights[valid].to(policy.dtype),
        )

    @property
    def step_count(self) -> int | None:
        return self.step_lists

    def counts(self) -> tuple[int]:
        """What `as_part_of` takes of a whole step: the number of valid lists."""
        return (int(self.valid.sum()),)

    def as_part_of(self, step_lists: int) -> "RankedBatch":
        return replace(self, step_lists=step_lists)

    def pairs(self, which: str = "all") -> PreferenceBatch:
        """The same as pairs, for the losses of pairs: 'all', or 'best' against each of the rest.

        Each sequence is scored once, however many pairs it stands in, and each pair has its list's weight.
        """
        if which not in ("all", "best"):
            raise ValueError(f"which should be 'all' or 'best', but it is {which!r}.")
        k = self.ranks.shape[1]
        better, worse = torch.triu_indices(k, k, offset=1, device=self.ranks.device)
        if which == "best":
            better, worse = better[better == 0], worse[better == 0]
        pairs = rearrange(
            torch.stack([self.ranks[:, better], self.ranks[:, worse]]), "side l q -> (l q) side"
        )
        real = (pairs >= 0).all(dim=-1)
        weights = None if self.weights is None else self.weights.repeat_interleave(len(better))[real]
        return PreferenceBatch(self.sequences, pairs[real], pair_weights=weights)

    def metrics(self, data: Any, values: Tensor, beta: float) -> dict[str, Tensor]:
        return list_metrics(self.sequences, data, values, beta)


@dataclass(frozen=True)
class Mismatched(TensorDataclass):
    """Prompts with completions of other prompts, which tell how far the policy is from the reference."""

    sequences: ScoredSequences

    @torch.no_grad()
    def log_ratios(self, policy: Score, reference: ScoreOrNone) -> Float[Tensor, "2"]:
        """The sum of their log-ratios in nats, and how many they are."""
        ratios, before = policy(self.sequences), reference(self.sequences)
        ratios = ratios if before is None else ratios - before
        real = self.sequences.length > 0
        return torch.stack([ratios[real].sum(), real.sum().to(ratios.dtype)])


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class UnpairedBatch(TensorDataclass):
    """Sequences with a label each, True where wanted, and `mismatched`, by which `KTO` estimates its KL.

    `weights` multiply the rows' losses. Where this batch is a part of an optimizer step, `step_rows` counts
    the valid rows of the whole step, and `step_shift` is the whole step's estimate: the sum of what
    `dpo(part.mismatched)` gives for its parts, the first number divided by the second. Without it each batch
    makes its own.
    """

    sequences: ScoredSequences
    mismatched: Mismatched
    label: Bool[Tensor, "s"]
    weights: Float[Tensor, "s"] | None = None
    step_rows: int | None = None
    step_shift: Float[Tensor, ""] | None = None

    @classmethod
    def from_lists(
        cls,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        labels: Sequence[bool],
        mismatched: Sequence[Ids] | None = None,
        weights: Float[Tensor, "s"] | None = None,
    ) -> "UnpairedBatch":
        """One completion and one label for each prompt, and for its mismatch one of another prompt.

        Without `mismatched` these are taken from the rows themselves. Empty ones do not count.
        """
        if not len(prompts) == len(completions) == len(labels):
            lengths = f"{len(prompts)}, {len(completions)} and {len(labels)}"
            raise ValueError(f"prompts, completions and labels should be as many, but there are {lengths}.")
        if not all(isinstance(label, bool) for label in labels):
            raise TypeError("labels should be True or False, one for each completion.")
        if mismatched is None:
            others = partners([tuple(prompt) for prompt in prompts])
            if not any(other is not None for other in others):
                raise ValueError(
                    "expected rows of two prompts or more, of which each gets a completion of another, got "
                    "one: make batches larger, or give mismatched completions."
                )
            mismatched = [() if other is None else completions[other] for other in others]
        elif len(mismatched) != len(prompts):
            counts = f"{len(mismatched)} for {len(prompts)}"
            raise ValueError(f"each prompt needs a mismatched completion, but there are {counts}.")
        apart = Mismatched(ScoredSequences.from_lists(prompts, mismatched))
        labelled = torch.tensor(list(labels))
        return cls(ScoredSequences.from_lists(prompts, completions), apart, labelled, weights)

    @property
    def valid(self) -> Bool[Tensor, "s"]:
        """Rows with a scored token."""
        return self.sequences.length > 0

    def prepared(self, policy: Score, reference: ScoreOrNone) -> "UnpairedBatch":
        """With an estimate of the KL, its own where the step has none."""
        if self.step_shift is not None:
            return self
        total, count = self.mismatched.log_ratios(policy, reference)
        return replace(self, step_shift=total / count.clamp(min=1))

    @property
    def links(self) -> Int[Tensor, "q 2"]:
        """Sequences that meet in a loss: none."""
        return self.sequences.row.new_zeros(0, 2)

    def log_probs(self, policy: Float[Tensor, "s"], reference: Float[Tensor, "s"] | None) -> UnpairedLogProbs:
        """Of the valid rows, from sums per sequence."""
        valid, shift = self.valid, self.step_shift
        assert shift is not None  # `prepared` has seen to it
        return UnpairedLogProbs(
            policy=policy[valid],
            reference=None if reference is None else reference[valid].to(policy.dtype),
            label=self.label[valid],
            shift=shift.to(policy.dtype),
            length=self.sequences.length[valid],
            weights=None if self.weights is None else self.weights[valid].to(policy.dtype),
        )

    @property
    def step_count(self) -> int | None:
        return self.step_rows

    def counts(self) -> tuple[int]:
        """What `as_part_of` takes of a whole step: the number of valid rows."""
        return (int(self.valid.sum()),)

    def as_part_of(self, step_rows: int, step_shift: Float[Tensor, ""] | None = None) -> "UnpairedBatch":
        return replace(self, step_rows=step_rows, step_shift=step_shift)

    def metrics(self, data: Any, values: Tensor, beta: float) -> dict[str, Tensor]:
        return row_metrics(self.sequences, data, values, beta)


ListedBatch = RankedBatch | UnpairedBatch
