"""Batches of other data than pairs, for `dpo(batch)`: ranked lists, and single rows with a label."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from beartype import beartype
from einops import rearrange
from jaxtyping import Bool, Int, jaxtyped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dpo_wrapper.losses import RankedLogProbs, UnpairedLogProbs
from dpo_wrapper.movable import Movable
from dpo_wrapper.sequences import PreferenceBatch, ScoredSequences

Ids = Sequence[int]
Score = Callable[[ScoredSequences], Tensor]
ScoreOrNone = Callable[[ScoredSequences], Tensor | None]


def scored(prompts: Sequence[Ids], completions: Sequence[Ids]) -> ScoredSequences:
    """Each prompt followed by its completion, whose tokens are scored."""
    rows = [torch.tensor([*x, *y], dtype=torch.long) for x, y in zip(prompts, completions, strict=True)]
    if not rows:
        raise ValueError("expected at least one completion, got none: leave such a batch out.")
    seqs = pad_sequence(rows, batch_first=True)
    real = torch.arange(seqs.shape[1]) < torch.tensor([[len(row)] for row in rows])
    prompt = torch.arange(seqs.shape[1]) < torch.tensor([[len(x)] for x in prompts])
    return ScoredSequences.from_padded(seqs, ~prompt, real)


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class RankedBatch(Movable):
    """Sequences, and lists of them: row `l` of `ranks` holds the indices of a list, the best first, then -1.

        ranks   0  1  2     sequences 0 to 2 answer one prompt, 0 the best of them
                3  4 -1     3 and 4 another

    `step_lists` counts the lists of a whole optimizer step, where this batch is a part of it.
    """

    sequences: ScoredSequences
    ranks: Int[Tensor, "l k"]
    step_lists: int | None = None

    @classmethod
    def from_lists(cls, prompts: Sequence[Ids], completions: Sequence[Sequence[Ids]]) -> "RankedBatch":
        """A list of completions, the best first, for each prompt, all as token ids."""
        if len(prompts) != len(completions):
            counts = f"{len(prompts)} and {len(completions)}"
            raise ValueError(f"each prompt needs a list of completions, but there are {counts}.")
        owners = [x for x, ranked in zip(prompts, completions, strict=True) for _ in ranked]
        sequences = scored(owners, [y for ranked in completions for y in ranked])
        ends = torch.tensor([len(ranked) for ranked in completions]).cumsum(dim=0).tolist()
        rows = [torch.arange(end - len(ranked), end) for ranked, end in zip(completions, ends, strict=True)]
        return cls(sequences, pad_sequence(rows, batch_first=True, padding_value=-1))

    @property
    def real(self) -> Bool[Tensor, "l k"]:
        """Where there is a completion with a scored token."""
        return (self.ranks >= 0) & (self.sequences.length[self.ranks.clamp(min=0)] > 0)

    def log_probs(self, policy: Score, reference: ScoreOrNone) -> RankedLogProbs:
        """Of the lists that rank at least two completions."""
        real = self.real
        valid = real.sum(dim=-1) > 1
        ranks, before = self.ranks.clamp(min=0)[valid], reference(self.sequences)
        sums = policy(self.sequences)
        table = None if before is None else before[ranks].to(sums.dtype)
        return RankedLogProbs(sums[ranks], table, real[valid])

    @property
    def step_count(self) -> int | None:
        return self.step_lists

    def pairs(self, which: str = "all") -> PreferenceBatch:
        """The same as pairs, for the losses of pairs: 'all', or 'best' against each of the rest.

        Each sequence is scored once, however many pairs it stands in.
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
        return PreferenceBatch(self.sequences, pairs[(pairs >= 0).all(dim=-1)])

    def metrics(self, data: Any, values: Tensor, beta: float) -> dict[str, Tensor]:
        """`rewards/accuracies` is how often the best has the highest reward; means are over `lists/valid`."""
        rewards = beta * data.logratio.detach().masked_fill(~data.real, -torch.inf)
        best = rewards.gather(-1, data.real.int().argmax(dim=-1, keepdim=True))  # the first with a score
        return {
            "loss": _mean(values),
            "rewards/chosen": _mean(best.squeeze(-1)),
            "rewards/accuracies": _mean((best >= rewards).all(dim=-1).to(values.dtype)),
            "lists/valid": values.new_tensor(float(len(values))),
        }


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class UnpairedBatch(Movable):
    """Sequences with a label each, True where wanted; `mismatched` has prompts with others' completions.

    The KL of `KTO` is estimated over the rows of one forward pass: where a step has several batches, each has
    its own estimate. `step_rows` counts the rows of a whole optimizer step.
    """

    sequences: ScoredSequences
    mismatched: ScoredSequences
    label: Bool[Tensor, "s"]
    step_rows: int | None = None

    @classmethod
    def from_lists(
        cls, prompts: Sequence[Ids], completions: Sequence[Ids], labels: Sequence[bool]
    ) -> "UnpairedBatch":
        """One completion and one label for each prompt, whose mismatch is the completion before its own."""
        if not len(prompts) == len(completions) == len(labels):
            lengths = f"{len(prompts)}, {len(completions)} and {len(labels)}"
            raise ValueError(f"prompts, completions and labels should be as many, but there are {lengths}.")
        if len(prompts) < 2:
            raise ValueError(
                "expected two rows or more, of which each gets another's completion, got one: "
                "make batches larger."
            )
        if not all(isinstance(label, bool) for label in labels):
            raise TypeError("labels should be True or False, one for each completion.")
        others = [completions[-1], *completions[:-1]]
        return cls(scored(prompts, completions), scored(prompts, others), torch.tensor(list(labels)))

    def log_probs(self, policy: Score, reference: ScoreOrNone) -> UnpairedLogProbs:
        """Of the rows with a scored token."""
        valid, matched = self.sequences.length > 0, self.mismatched.length > 0
        with torch.no_grad():
            apart, before = policy(self.mismatched), reference(self.mismatched)
            apart = apart if before is None else apart - before
            shift = apart[matched].sum() / max(1, int(matched.sum()))
        before = reference(self.sequences)
        sums = policy(self.sequences)
        fixed = None if before is None else before[valid].to(sums.dtype)
        return UnpairedLogProbs(sums[valid], fixed, self.label[valid], shift.to(sums.dtype))

    @property
    def step_count(self) -> int | None:
        return self.step_rows

    def metrics(self, data: Any, values: Tensor, beta: float) -> dict[str, Tensor]:
        """Rewards are means over the rows of their kind; `kl` is the estimate, before it is clamped."""
        rewards = beta * data.logratio.detach()
        return {
            "loss": _mean(values),
            "rewards/chosen": _mean(rewards[data.label]),
            "rewards/rejected": _mean(rewards[~data.label]),
            "kl": data.shift.detach(),
            "rows/valid": values.new_tensor(float(len(values))),
        }


def _mean(values: Tensor) -> Tensor:
    return values.detach().sum() / max(1, len(values))


ListedBatch = RankedBatch | UnpairedBatch
