"""Direct preference optimisation as a module around a language model."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpo_wrapper import batches, validation
from dpo_wrapper.batches import Batch, PreferenceBatch, Reduce, SequenceLogProbs, UnpairedBatch
from dpo_wrapper.log_probs import FusedLoss, Impl
from dpo_wrapper.losses.combine import CombinedLoss, LossArgument
from dpo_wrapper.losses.pairwise import Sigmoid
from dpo_wrapper.metrics import batch_metrics
from dpo_wrapper.reference.build import ReferenceKind, build_reference
from dpo_wrapper.reference.owner import ReferenceOwner
from dpo_wrapper.reference.reference import CachedReference
from dpo_wrapper.scoring import Scorer, SharePrefix, compile_note, group_tokens, runs_uncompiled
from dpo_wrapper.scoring.rounding import narrowest_dtype


class DPO(ReferenceOwner):
    """Train `model` on preferences: `loss = dpo(preferred_seq, unpreferred_seq, prompt_mask)`.

    Rafailov et al. 2023, "Direct Preference Optimization" (arXiv 2305.18290), eq. 7.

    Args:
        model: the policy. An x-transformers wrapper, a Hugging Face causal LM (PEFT-wrapped or not), or any
            causal module from `Int[b n]` ids to `Float[b n v]` logits or to an output with `.logits`.
        beta: strength of the pull towards the reference, for the default loss.
        pad_id: where no mask is given, leading and trailing runs of this id are padding.
        loss: one of `dpo_wrapper.losses`, a function from `PairLogProbs` to one value per pair, or a list of
            `(loss, weight)`; by default `Sigmoid(beta)`.
        reference: `'copy'`, a frozen copy made now; `'adapter'`, the policy with its fresh LoRA adapter off;
            a module; what `precompute_ref_log_probs` returns; `'none'`; or `'auto'`: none if no loss needs
            one, else the adapter where that is possible, else a copy.
        reference_dtype, reference_device: dtype of a copy, and the device where it stays. Such a copy shares
            no storage with the policy; in another dtype it differs by rounding.
        cache_ref_log_probs: keep the reference's log-probs in memory and compute each sequence once.
        share_prefix: compute prefixes that sequences share once, and no padding. `'auto'` does so if a trial
            gives the log-probs of padded rows, and else warns; True raises then; False pads.
        log_prob_impl: as `impl` in `token_log_probs`.
        ld_alpha: tokens beyond the length of the shorter completion are weighted by it, in the sums of policy
            and reference (LD-DPO, Liu 2024, arXiv 2409.06411).
        wpo: weight each pair by how likely the policy is to write its sides (Zhou 2024, arXiv 2406.11827).
        disable_dropout: compute the policy without dropout; `training` flags are afterwards as they were.
        router_aux_loss_coef: where gradients are computed, add so many times transformers' `aux_loss`, which
            balances experts; None: the model's own if its config has `output_router_logits`, else 0.

    Attributes:
        policy_model, ref_model: the modules, which may be assigned; `ref_model` is None if the reference has
            none of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        beta: float = 0.1,
        pad_id: int | None = None,
        loss: LossArgument | None = None,
        reference: ReferenceKind | nn.Module | CachedReference = "auto",
        reference_dtype: torch.dtype | None = None,
        reference_device: torch.device | str | None = None,
        cache_ref_log_probs: bool = False,
        share_prefix: SharePrefix = "auto",
        log_prob_impl: Impl = "auto",
        ld_alpha: float = 1.0,
        wpo: bool = False,
        disable_dropout: bool = True,
        router_aux_loss_coef: float | None = None,
    ) -> None:
        """Put a policy beside its reference; `help(DPO)` describes the arguments."""
        super().__init__()
        validation.check_share_prefix(share_prefix)
        self.loss = CombinedLoss(Sigmoid(beta) if loss is None else loss)
        self.loss.check_beta(beta)
        self.pad_id = validation.check_pad_id(pad_id)
        self.ld_alpha = self.loss.check_ld_alpha(ld_alpha)
        self.wpo = self.loss.check_wpo(wpo)
        self.disable_dropout = validation.check_flag("disable_dropout", disable_dropout)
        self.policy = Scorer(model, log_prob_impl, share_prefix, None, disable_dropout, router_aux_loss_coef)
        self.policy_model = model
        validation.check_flag("cache_ref_log_probs", cache_ref_log_probs)
        self.per_token = self.ld_alpha < 1
        options = (reference_dtype, reference_device, self.per_token, cache_ref_log_probs)
        self.set_reference(build_reference(reference, self.policy, self.loss.needs_reference, *options))

    @runs_uncompiled
    def forward(
        self,
        preferred_seq: Tensor | Batch,
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
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over the valid pairs: those both of whose sides have a scored token.

        A token is scored if it is real and not prompt. Its log-prob is read at the last real token before it,
        so the first real token never is. A sequence's log-prob is the sum over its scored tokens, in nats.

        Args:
            preferred_seq, unpreferred_seq: Int[b n] and Int[b m] token ids; or a `PreferenceBatch`,
                `RankedBatch` (for `PlackettLuce`) or `UnpairedBatch` (for `KTO`) alone.
            prompt_mask: Bool[b max(n, m)], True on tokens that are not scored, in any pattern; or a tuple,
                one mask for each side.
            seq_mask: the same shapes, True on real tokens; padding may stand left, right or in the middle.
            preferred_seq_mask, unpreferred_seq_mask: Bool[b n], Bool[b m], another way of giving `seq_mask`.
            ref_log_probs: (Float[b], Float[b]) of chosen and rejected, used instead of the reference.
            pair_weights: Float[b], not negative; each multiplies the loss of its pair.
            margins: Float[b], nats by which chosen should win: subtracted inside the sigmoid or hinge.
            return_metrics: return `(loss, metrics)`, detached tensors as `dpo_wrapper.metrics` names them.

        Returns:
            Float[], a zero with zero gradients if no pair is valid. The metric `loss` is without `aux_loss`.

        Raises:
            TypeError, ValueError: input that does not fit, a policy that cannot train, or a reference that
                would have moved, before any forward pass of the policy.
        """
        self.check_trains()
        masks = (prompt_mask, seq_mask, preferred_seq_mask, unpreferred_seq_mask)
        batch = self.as_batch(preferred_seq, unpreferred_seq, *masks, pair_weights, margins)
        is_given = ref_log_probs is not None
        with self.lower_layers.recording() as record:
            reference = batch.given_log_probs(ref_log_probs) if is_given else self.reference(batch.sequences)
        extras, fused_loss = ("log_sum_p2",) if self.wpo else (), self.fused_loss(batch, reference)
        with self.policy_mode(), self.lower_layers.replaying(record, batch.sequences):
            policy = self.policy(batch.sequences, extras, fused_loss)
        log_probs = batch.log_probs(policy, reference)
        losses = self.loss(log_probs)
        loss = self.policy.add_aux_loss(losses.sum() / batch.denominator, policy, batch)
        if torch.is_grad_enabled():
            self.loss.observe(log_probs, is_whole_step=batch.step_denominator is None)
        if not return_metrics:
            return loss
        dtype = narrowest_dtype(self, batch.sequences.ids.device)
        return loss, batch_metrics(batch, log_probs, losses, self.loss.reward_loss, dtype, policy.aux_loss)

    def as_batch(self, *arguments: Any) -> Any:
        """The batch of a call, checked against loss and (probed) policy, for `KTO` with its KL estimate."""
        batch = batches.batch_from_arguments(self.pad_id, *arguments)
        self.loss.check_dataset_type(batch.dataset_type)
        if isinstance(batch, PreferenceBatch):
            self.loss.check_columns(batch.margins is not None, batch.weights is not None)
            batch = batch.replace(ld_alpha=self.ld_alpha)
        self.policy.check(batch.sequences)
        if isinstance(batch, UnpairedBatch) and batch.step_kl is None:
            batch = batch.with_kl(self.kl_sums(batch))
        return batch

    def fused_loss(self, batch: Batch, reference: SequenceLogProbs | None) -> FusedLoss | None:
        """The loss as a function of token log-probs, which gives a trained head its gradients in forward."""
        if not (self.training and self.loss.is_deterministic and self.policy.trains_head) or self.wpo:
            return None

        def loss_of_tokens(tokens: Tensor) -> Tensor:
            tokens = tokens.to(batch.sequences.ids.device)  # a head may be on another
            log_probs = batch.log_probs(batch.sequences.log_probs(tokens), reference)
            return self.loss(log_probs).sum() / batch.denominator

        on_cpu = batch.on_cpu
        groups = group_tokens(on_cpu.sequences, on_cpu.linked_sequences) if self.loss.is_per_pair else None
        return FusedLoss(loss_of_tokens, groups)

    @torch.no_grad()
    def kl_sums(self, batch: UnpairedBatch) -> Float[Tensor, "2"]:
        """What a batch adds to its step's KL estimate: the sum of log-ratios in nats, and their number."""
        policy, reference = self.score_sequences(batch.kl_sequences)
        ratios = policy.sums if reference is None else policy.sums - reference.sums
        is_counted = batch.kl_sequences.length > 0
        return torch.stack([ratios.where(is_counted, 0.0).sum(), is_counted.sum().to(ratios.dtype)])

    def normalize_over_step(self, parts: list[Any], reduce: Reduce | None = None) -> list[Any]:
        """Give the micro-batches of a step its totals, so that their losses add up to the step's loss."""
        return batches.normalize_over_step(parts, reduce, self.kl_sums)

    def end_step(self, reduce: Reduce | None = None) -> None:
        """Call this after the last micro-batch of a step, for losses with a state (`BetaDPO`).

        A call with a whole step does so by itself. `reduce` sums a tensor over processes.
        """
        self.loss.end_step(reduce)

    def explain(self) -> str:
        """Which paths are in use and why not the others, in plain words; known after the first call."""
        return f"policy: {self.policy.explain()}\nreference: {self.explain_reference()}{compile_note(self)}"
