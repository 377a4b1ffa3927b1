"""Direct preference optimisation as a module around a language model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpo_wrapper import validation
from dpo_wrapper.batches.pair_log_probs import Reading
from dpo_wrapper.batches.ranked import ListedBatch, Mismatched
from dpo_wrapper.batches.sequences import PreferenceBatch, ScoredSequences
from dpo_wrapper.batches.token_level import check_wpo
from dpo_wrapper.log_probs import Impl
from dpo_wrapper.losses import (
    Objective,
    PairFunction,
    PairLogProbs,
    Sigmoid,
    check_columns,
    combined,
    needs_reference,
    weighted,
)
from dpo_wrapper.metrics import pair_metrics
from dpo_wrapper.models.eval_mode import turn_off_dropout
from dpo_wrapper.reference.cache import CachedReference
from dpo_wrapper.reference.frozen_copy import copy_with_closures
from dpo_wrapper.reference.reference import Reference
from dpo_wrapper.reference.sync import check_alpha, sync
from dpo_wrapper.running import GapState, Reduce
from dpo_wrapper.scoring.fused_loss import Foretold
from dpo_wrapper.scoring.scorer import Scorer


class DPO(nn.Module):
    """Train `model` on preference pairs: `loss = dpo(preferred_seq, unpreferred_seq, prompt_mask)`.

    Rafailov et al. 2023, "Direct Preference Optimization" (arXiv 2305.18290), eq. 7.

    Args:
        model: the policy. An x-transformers `TransformerWrapper` or `AutoregressiveWrapper`, a Hugging Face
            causal LM (PEFT-wrapped or not), or any causal module from `Int[b n]` ids to `Float[b n v]`
            logits or to an output with `.logits`.
        beta: strength of the pull towards the reference, for the default loss.
        pad_id: where no mask is given, leading and trailing runs of this id are padding.
        loss: one of `dpo_wrapper.losses`, a function from `PairLogProbs` to one value per pair, or a list of
            `(loss, weight)`; by default `Sigmoid(beta)`.
        reference: `'copy'`, a frozen copy made now; `'adapter'`, the policy with its fresh LoRA adapter off;
            a module; what `cache_reference` gives; `'none'`; or `'auto'`: none if no loss needs one, else the
            adapter where that is possible, else a copy.
        reference_dtype: of a copy, instead of the policy's: half the memory in bfloat16, but a fresh DPO
            starts near ln 2 then and not at it, and the copy shares no storage.
        reference_device: where a copy stays, whatever device the policy moves to: `'cpu'` leaves an
            accelerator's memory to the policy, for the time that it takes there. It shares no storage.
        remember_reference: compute the reference once for each sequence, and recall it from then on.
        share_prefix: compute every prefix that sequences of a batch share once, and no padding. `'auto'`
            does so if a trial on the model gives the log-probs of padded sequences, and else warns;
            True raises then; False pads.
        log_prob_impl: as `impl` in `token_log_probs`.
        ld_alpha: below 1, what the longer side of a pair has more than the other counts only so much in the
            sums of policy and reference (LD-DPO, Liu 2024, arXiv 2409.06411); 0 leaves it out.
        wpo: multiply the loss of each pair by how like the policy's own writing its two sides are (WPO, Zhou
            2024, arXiv 2406.11827).
        disable_dropout: keep the policy in eval mode, in which it differs from the reference by training
            alone.

    Attributes:
        policy_model, ref_model (None without one of its own), beta.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        beta: float = 0.1,
        pad_id: int | None = None,
        loss: Objective | PairFunction | Sequence[tuple[Objective | PairFunction, float]] | None = None,
        reference: str | nn.Module | CachedReference = "auto",
        reference_dtype: torch.dtype | None = None,
        reference_device: torch.device | str | None = None,
        remember_reference: bool = False,
        share_prefix: str | bool = "auto",
        log_prob_impl: Impl = "auto",
        ld_alpha: float = 1.0,
        wpo: bool = False,
        disable_dropout: bool = True,
    ) -> None:
        super().__init__()
        share = validation.check_share_prefix(share_prefix)
        policy_scorer = Scorer(model, log_prob_impl, share=share)
        self.losses = weighted(Sigmoid(beta) if loss is None else loss)
        self.beta = validation.check_beta(beta, self.losses, given=loss is not None)
        self.pad_id = validation.check_pad_id(pad_id)
        self.ld_alpha = validation.check_ld_alpha(ld_alpha, self.losses)
        self.wpo = check_wpo(wpo, self.losses)
        self.disable_dropout = validation.check_flag("disable_dropout", disable_dropout)

        self.reference = Reference(
            model, reference, needs_reference(self.losses), reference_dtype, reference_device
        )
        remembers = validation.check_flag("remember_reference", remember_reference)
        self.reference.recalls(per_token=self.ld_alpha < 1, remembers=remembers)
        self.policy_model = model
        self.ref_model = self.reference.module
        self._ddp_params_and_buffers_to_ignore = self.reference.apart("ref_model")
        self.gap = GapState() if any(term.needs_gap for term, _ in self.losses) else None
        self.score_policy = policy_scorer
        reference_model = model if self.ref_model is None else self.ref_model
        self.score_reference = Scorer(reference_model, log_prob_impl, apart_from=policy_scorer, share=share)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DPO":
        """What `.to()` and its relatives do, but that a reference with a device of its own stays there."""
        if self.reference.device is None:
            return super()._apply(fn, recurse)
        away, self.ref_model = self.ref_model, None
        try:
            super()._apply(fn, recurse)
        finally:
            self.ref_model = away
        self.reference.applied(fn)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "DPO":
        """A copy whose policy reads no weights but its own, with a tied head in x-transformers too."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy_with_closures(self.__dict__, self, memo))
        return twin

    def forward(
        self,
        preferred_seq: Tensor | PreferenceBatch | ListedBatch | Mismatched,
        unpreferred_seq: Tensor | None = None,
        prompt_mask: Tensor | tuple[Tensor, Tensor] | None = None,
        seq_mask: Tensor | tuple[Tensor, Tensor] | None = None,
        *,
        preferred_seq_mask: Tensor | None = None,
        unpreferred_seq_mask: Tensor | None = None,
        ref_log_probs: tuple[Tensor, Tensor] | None = None,
        pair_weights: Tensor | None = None,
        margins: Tensor | None = None,
        return_metrics: bool = False,
    ) -> Any:
        """The mean loss over the valid pairs: those both of whose sides have a scored token.

        A token is scored when it is real and not prompt; its score is read at the last real token before it,
        and the first real token is never scored. A sequence's log-prob is the sum of its scores, in nats.

        Args:
            preferred_seq, unpreferred_seq: Int[b n] and Int[b m] token ids; or a `PreferenceBatch` (for
                `PlackettLuce` a `RankedBatch`, for `KTO` an `UnpairedBatch` or its part `mismatched`, see
                there) and nothing more.
            prompt_mask: Bool[b max(n, m)], True on tokens that are not scored, in any pattern; or a tuple,
                one mask for each side.
            seq_mask: the same shapes, True on real tokens; padding may stand left, right or in the middle.
            preferred_seq_mask, unpreferred_seq_mask: Bool[b n] and Bool[b m], another way of giving
                `seq_mask`.
            ref_log_probs: (Float[b], Float[b]) reference log-probs of chosen and rejected, instead of the
                reference.
            pair_weights: Float[b], not negative; each multiplies the loss of its pair.
            margins: Float[b], nats by which chosen should win: subtracted inside the sigmoid or hinge.
            return_metrics: return `(loss, metrics)`, detached tensors as `dpo_wrapper.metrics` names them.

        Returns:
            Float[], a zero with zero gradients if no pair is valid.

        Raises:
            TypeError, ValueError: input that does not fit, before any forward pass.
        """
        masks = (prompt_mask, seq_mask, preferred_seq_mask, unpreferred_seq_mask)
        beside = (unpreferred_seq, *masks, pair_weights, margins)
        validation.check_data(self.losses, preferred_seq)
        if isinstance(preferred_seq, (ListedBatch, Mismatched)):
            validation.check_alone((*beside, ref_log_probs))
            return self.listed(preferred_seq, return_metrics)
        if isinstance(preferred_seq, PreferenceBatch):
            batch = validation.check_batch(preferred_seq, beside)
        else:
            seqs = validation.check_sequences(preferred_seq, unpreferred_seq)
            prompts = validation.check_prompt_mask(prompt_mask, seqs)
            per_side = (preferred_seq_mask, unpreferred_seq_mask)
            reals = validation.check_seq_masks(seq_mask, per_side, seqs, self.pad_id)
            columns = validation.check_columns_of(pair_weights, margins, len(seqs[0]), seqs[0].device)
            batch = PreferenceBatch.from_padded(seqs, prompts, reals, *columns)

        check_columns(
            self.losses, margins=batch.margins is not None, pair_weights=batch.pair_weights is not None
        )
        self.settle()
        self.score_policy.check(batch.sequences)
        pairs = self.pairs(batch, ref_log_probs)

        per_pair, loss = self.share(pairs, batch.step_pairs)
        if self.gap is not None and torch.is_grad_enabled():
            self.gap.see(pairs.chosen_logratio - pairs.rejected_logratio)
            if batch.step_pairs is None:
                self.end_step()
        if not return_metrics:
            return loss
        return loss, pair_metrics(batch, pairs, per_pair, self.beta)

    def listed(self, batch: ListedBatch | Mismatched, return_metrics: bool) -> Any:
        """The same for ranked lists and for single rows: the mean over those that are valid."""
        self.settle()
        self.score_policy.check(batch.sequences)
        if isinstance(batch, Mismatched):
            return batch.log_ratios(self.score_policy, self.reference_sums)
        batch = batch.prepared(self.score_policy, self.reference_sums)
        reference = self.reference_sums(batch.sequences)

        def learned(scores: Tensor) -> Any:
            return batch.log_probs(batch.sequences.sums(scores), reference)

        foretold = self.foretold(learned, batch.step_count, batch.links)
        data = learned(self.score_policy.token_scores(batch.sequences, foretold))
        values, loss = self.share(data, batch.step_count)
        return (loss, batch.metrics(data, values, self.beta)) if return_metrics else loss

    def share(self, data: Any, step_count: int | None) -> tuple[Tensor, Float[Tensor, ""]]:
        """The loss of each pair, list or row, and their share of the step's mean."""
        values = combined(self.losses, data)
        return values, values.sum() / max(1, len(values) if step_count is None else step_count)

    def foretold(
        self, learned: Callable[[Tensor], Any], step_count: int | None, links: Tensor
    ) -> Foretold | None:
        """What scores will be made into, by way of `learned`; None in eval mode, where nothing may follow."""
        if not self.training or not all(loss.pure() for loss, _ in self.losses):
            return None
        apart = all(loss.per_pair for loss, _ in self.losses)
        return Foretold(lambda scores: self.share(learned(scores), step_count)[1], links if apart else None)

    def pairs(self, batch: PreferenceBatch, given: tuple[Tensor, Tensor] | None) -> PairLogProbs:
        """What the losses look at, from one pass of the reference and one of the policy."""
        if given is not None and self.ld_alpha < 1:
            raise ValueError(
                "ref_log_probs are sums of all tokens, but ld_alpha needs single ones: give one of the two."
            )
        ref_scores = None
        if self.ld_alpha < 1:
            ref_scores = self.reference.token_scores(self.score_reference, sequences=batch.sequences)
        if ref_scores is None:
            reference = self.reference_log_probs(batch, given)
        else:
            reference = batch.sequences.sums(ref_scores)
        prompted = any(loss.needs_prompt() for loss, _ in self.losses)
        reading = Reading(batch, reference, ref_scores, self.gap, prompted, self.ld_alpha)
        if self.wpo:  # its weights are made of more than scores
            scores, more = self.score_policy.token_scores_and(reading.sequences, ("log_sum_p2",))
            return reading.pairs(scores, **more)
        foretold = self.foretold(reading.pairs, batch.step_pairs, reading.links)
        return reading.pairs(self.score_policy.token_scores(reading.sequences, foretold))

    def explain(self) -> str:
        """Which paths are in use, and why not the others, in plain words; known after the first call."""
        lines = [f"policy: {self.score_policy.explain()}"]
        if self.reference.exists:
            lines.append(f"reference: {self.reference.explain(self.score_reference)}")
        else:
            lines.append("reference: none")
        return "\n".join(lines)

    def end_step(self, reduce: Reduce | None = None) -> None:
        """Let what runs over steps (the mean gap of `BetaDPO`) move on.

        A call with a whole step does so by itself. Where a step has several batches (`as_part_of`), call this
        after the last; `reduce` sums a tensor over processes.
        """
        if self.gap is not None:
            self.gap.end_step(reduce)

    def sync_reference(self, alpha: float = 0.6) -> None:
        """Move the reference towards the policy: `ref <- alpha * policy + (1 - alpha) * ref` (TR-DPO).

        Gorbatovski 2024 (arXiv 2404.09656); alpha = 1 takes the policy over. Weights that the two share stay,
        so that of a policy with an adapter the adapters' weights are mixed (of LoRA each factor by itself).
        """
        sync(self.reference, self.policy_model, check_alpha(alpha))

    def settle(self) -> None:
        """Bring policy and reference into the modes they are computed in."""
        if self.disable_dropout:
            turn_off_dropout(self.policy_model)
        if self.ref_model is not None:
            self.ref_model.eval()

    def reference_log_probs(
        self, batch: PreferenceBatch, given: tuple[Tensor, Tensor] | None = None
    ) -> Float[Tensor, "s"] | None:
        """The reference's log-prob of each sequence; None where there is no reference."""
        if given is not None:
            of_pairs = torch.cat(validation.check_ref_log_probs(given, len(batch.pairs), batch.pairs.device))
            sums = of_pairs.new_zeros(batch.sequences.length.shape)
            return sums.index_put((batch.pairs.T.flatten(),), of_pairs)
        return self.reference_sums(batch.sequences)

    def reference_sums(self, sequences: ScoredSequences) -> Float[Tensor, "s"] | None:
        return self.reference.sums(self.score_reference, sequences)
