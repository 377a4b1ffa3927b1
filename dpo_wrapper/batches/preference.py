"""Batches of preference pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from beartype import beartype
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor

from dpo_wrapper.batches.batch import Batch
from dpo_wrapper.batches.pair_log_probs import discounted_sums, wpo_weights
from dpo_wrapper.batches.sequences import Ids, ScoredSequences, SequenceLogProbs, copy_to_cpu
from dpo_wrapper.losses.inputs import PairLogProbs
from dpo_wrapper.validation import (
    check_pair_values,
    check_prompt_mask,
    check_ref_log_probs,
    check_seq_masks,
    check_sequences,
)


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class PreferenceBatch(Batch):
    """Sequences, and the pairs among them.

    Attributes:
        pair_index: row `k` holds the indices of the chosen and the rejected sequence of pair `k`.
        weights: factors of the pairs' losses.
        margins: nats that losses with a margin subtract inside their sigmoid or hinge.
        ld_alpha: weight of the tokens beyond the length of the shorter completion (LD-DPO).
        step_chosen_tokens: number of scored chosen tokens in the valid pairs of the step (see `Batch`).
    """

    dataset_type: ClassVar[str] = "preference"

    pair_index: Int[Tensor, "p 2"]
    weights: Float[Tensor, "p"] | None = None
    margins: Float[Tensor, "p"] | None = None
    ld_alpha: float = 1.0
    step_chosen_tokens: int | None = None

    @classmethod
    def from_padded(
        cls,
        seqs: tuple[Int[Tensor, "b n"], Int[Tensor, "b m"]],
        prompt_masks: tuple[Bool[Tensor, "b n"], Bool[Tensor, "b m"]],
        seq_masks: tuple[Bool[Tensor, "b n"], Bool[Tensor, "b m"]],
        weights: Float[Tensor, "b"] | None = None,
        margins: Float[Tensor, "b"] | None = None,
    ) -> "PreferenceBatch":
        """Chosen and rejected rows, each side with its prompt mask and padding mask."""
        width = max(seqs[0].shape[1], seqs[1].shape[1])

        def stack_sides(sides: tuple[Tensor, Tensor]) -> Tensor:
            return torch.cat([F.pad(side, (0, width - side.shape[1])) for side in sides])

        rows = copy_to_cpu(stack_sides(seqs), ~stack_sides(prompt_masks), stack_sides(seq_masks))
        sequences = ScoredSequences.from_padded(*rows)
        weights, margins = (x.cpu() if isinstance(x, Tensor) else x for x in (weights, margins))
        return cls(sequences, index_stacked_sides(sequences), weights, margins).to(seqs[0].device)

    @classmethod
    def from_lists(
        cls,
        prompts: Sequence[Ids],
        chosen: Sequence[Ids],
        rejected: Sequence[Ids],
        weights: Float[Tensor, "b"] | None = None,
        margins: Float[Tensor, "b"] | None = None,
        scored: Sequence[Sequence[bool] | None] | None = None,
    ) -> "PreferenceBatch":
        """Two completions for each prompt, all as token ids.

        `scored` is as in `ScoredSequences.from_lists`, for all chosen sequences and then all rejected ones.
        """
        sequences = ScoredSequences.from_lists([*prompts, *prompts], [*chosen, *rejected], scored)
        return cls(sequences, index_stacked_sides(sequences), weights, margins)

    def check(self) -> None:
        if len(self.pair_index):
            count = len(self.sequences.length)
            low, high = torch.stack(torch.aminmax(self.on_cpu.pair_index)).tolist()
            if low < 0 or high >= count:
                raise ValueError(
                    f"pair_index should hold indices in [0, {count}), the batch's sequences, but they reach "
                    f"from {low} to {high}: index into this batch alone."
                )
        pairs, device = len(self.pair_index), self.pair_index.device
        if self.weights is not None:
            check_pair_values("weights", self.weights, pairs, device, 0.0, self.on_cpu.weights)
        if self.margins is not None:
            check_pair_values("margins", self.margins, pairs, device, on_cpu=self.on_cpu.margins)

    @property
    def valid(self) -> Bool[Tensor, "p"]:
        """Which pairs have a scored token on both sides."""
        return (self.sequences.length[self.pair_index] > 0).all(dim=-1)

    @property
    def linked_sequences(self) -> Int[Tensor, "p 2"]:
        return self.pair_index

    def step_totals(self) -> tuple[int, int]:
        """Numbers of valid pairs and of their scored chosen tokens."""
        host = self.on_cpu
        chosen = host.select_valid(host.pair_index)[:, 0]
        return len(chosen), int(host.sequences.length[chosen].sum())

    def with_step_totals(self, *totals: int) -> "PreferenceBatch":
        count, chosen_tokens = totals
        return self.replace(step_denominator=count, step_chosen_tokens=chosen_tokens)

    def log_probs(self, policy: SequenceLogProbs, reference: SequenceLogProbs | None) -> PairLogProbs:
        """The log-probs of the valid pairs.

        With `ld_alpha` below 1 both need `tokens`. With the extra `log_sum_p2`, pairs are weighted by WPO.
        """
        lengths, dtype = self.sequences.length, policy.sums.dtype
        pair_index = self.select_valid(self.pair_index)
        chosen, rejected = pair_index.unbind(dim=-1)
        if self.step_chosen_tokens is not None:
            mean_length = policy.sums.new_full((), self.step_chosen_tokens / self.denominator)
        else:
            mean_length = lengths[chosen].to(dtype).sum() / max(1, len(chosen))

        def sides(log_probs: SequenceLogProbs) -> tuple[Tensor, Tensor]:
            if self.ld_alpha == 1:
                return log_probs.sums[chosen].to(dtype), log_probs.sums[rejected].to(dtype)
            assert log_probs.tokens is not None
            tokens = log_probs.tokens.to(dtype)
            return discounted_sums(self.sequences, pair_index, tokens, self.ld_alpha)

        weights = None if self.weights is None else self.select_valid(self.weights).to(dtype)
        if "log_sum_p2" in policy.extras:
            wpo = wpo_weights(self.sequences, pair_index, policy)
            weights = wpo if weights is None else weights * wpo
        ref_chosen, ref_rejected = (None, None) if reference is None else sides(reference)
        policy_chosen, policy_rejected = sides(policy)
        return PairLogProbs(
            policy_chosen,
            policy_rejected,
            ref_chosen,
            ref_rejected,
            lengths[chosen],
            lengths[rejected],
            mean_length,
            margins=None if self.margins is None else self.select_valid(self.margins).to(dtype),
            weights=weights,
            unweighted_chosen=None if self.ld_alpha == 1 else policy.sums[chosen],
        )

    def given_log_probs(self, ref_log_probs: object) -> SequenceLogProbs:
        """Given reference log-probs of chosen and rejected, (Float[p], Float[p]), by sequence."""
        if self.ld_alpha < 1:
            raise ValueError(
                "ref_log_probs are sums of all tokens, but ld_alpha needs single ones: give one."
            )
        values = torch.cat(check_ref_log_probs(ref_log_probs, len(self.pair_index), self.pair_index.device))
        sums = values.new_zeros(self.sequences.length.shape)
        return SequenceLogProbs(sums.index_put((self.pair_index.T.flatten(),), values))


def batch_from_arguments(
    pad_id: int | None,
    preferred_seq: Tensor | Batch,
    unpreferred_seq: Tensor | None,
    prompt_mask: Tensor | tuple[Tensor, Tensor] | None,
    seq_mask: Tensor | tuple[Tensor, Tensor] | None,
    preferred_seq_mask: Tensor | None,
    unpreferred_seq_mask: Tensor | None,
    pair_weights: Tensor | None,
    margins: Tensor | None,
) -> Any:
    """The batch of a call of `DPO.forward`, after all checks that need no model.

    A ready-made batch passes if it is given alone.
    """
    side_masks = (preferred_seq_mask, unpreferred_seq_mask)
    if isinstance(preferred_seq, Batch):
        others = (unpreferred_seq, prompt_mask, seq_mask, *side_masks, pair_weights, margins)
        if any(argument is not None for argument in others):
            name = type(preferred_seq).__name__
            raise TypeError(f"a {name} holds ids, masks and weights already: give it alone.")
        preferred_seq.check()
        return preferred_seq
    seqs = check_sequences(preferred_seq, unpreferred_seq)
    prompt_masks = check_prompt_mask(prompt_mask, seqs)
    seq_masks = check_seq_masks(seq_mask, side_masks, seqs, pad_id)
    pairs, device = len(seqs[0]), seqs[0].device
    if pair_weights is not None:
        check_pair_values("pair_weights", pair_weights, pairs, device, minimum=0.0)
    if margins is not None:
        check_pair_values("margins", margins, pairs, device)
    return PreferenceBatch.from_padded(seqs, prompt_masks, seq_masks, pair_weights, margins)


def index_stacked_sides(sequences: ScoredSequences) -> Int[Tensor, "p 2"]:
    """The pairs of a stack of all chosen sequences and then all rejected ones."""
    return torch.arange(len(sequences.ids), device=sequences.ids.device).view(2, -1).T
