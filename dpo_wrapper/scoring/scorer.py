"""Log-probs of sequences under a model: hidden states of the scored positions, then the fused gather."""

import threading
import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpo_wrapper.batches.batch import Batch
from dpo_wrapper.batches.sequences import ScoredSequences, SequenceLogProbs
from dpo_wrapper.log_probs import FusedLoss, Impl, choose_impl
from dpo_wrapper.models import language_model
from dpo_wrapper.prefix_tree import PrefixSharingError, TreeOptions
from dpo_wrapper.scoring.probe import Probe, ProbeKey, SharePrefix
from dpo_wrapper.scoring.probe_model import probe_model
from dpo_wrapper.scoring.token_log_probs import compute_log_probs
from dpo_wrapper.validation import (
    check_ids,
    check_mask,
    check_router_aux_loss_coef,
    check_vocabulary,
    describe_type,
)

probing_lock = threading.RLock()
"""A model is probed by one thread at a time; others wait for the result."""


class Scorer:
    """Computes log-probs of sequences under one model, which the first call probes.

    It is probed again where what was found may not hold: on another device, in other dtypes, under another
    autocast, with gradients where there were none, or with other parameters that train.

    Args:
        model: the model.
        impl: as in `token_log_probs`.
        share_prefix: as in `DPO`.
        policy: for a reference the policy's scorer. The two should have one vocabulary, and the reference's
            output should not depend on parameters that train in the policy.
        is_eval: whether the model will be called in eval mode, whatever its mode is when it is probed.
        router_aux_loss_coef: as in `DPO`; a reference has no such loss.

    Attributes:
        probe: what was found of the model in the state of the latest call; None before the first.
        probes: the same for each state so far.
    """

    def __init__(
        self,
        model: nn.Module,
        impl: Impl = "auto",
        share_prefix: SharePrefix = False,
        policy: "Scorer | None" = None,
        is_eval: bool = True,
        router_aux_loss_coef: float | None = 0.0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"a model should be a torch.nn.Module, but it is {describe_type(model)}: load or build it."
            )
        choose_impl(impl)
        self.language_model = language_model(model)
        self.impl = impl
        self.policy = policy
        self.share_prefix = share_prefix
        self.is_eval = is_eval
        self.router_aux_loss_coef = self.check_aux_loss(router_aux_loss_coef)
        self.probe: Probe | None = None
        self.probes: dict[ProbeKey, Probe] = {}

    def __call__(
        self, sequences: ScoredSequences, extras: Sequence[str] = (), fused_loss: FusedLoss | None = None
    ) -> SequenceLogProbs:
        """Log-probs of the sequences, after `check`; arguments as in `compute_log_probs`."""
        probe = self.check(sequences)
        options = (extras, fused_loss, torch.is_grad_enabled() and self.aux_loss_coef > 0)
        if torch.is_grad_enabled():
            torch.clear_autocast_cache()  # before 2.11, torch uses casts made without gradients again
        try:
            return compute_log_probs(self.language_model, sequences, probe, *options)
        except PrefixSharingError as error:  # of a model that has changed since it was probed
            reason = str(error)
        probe = self.stop_sharing(reason)
        return compute_log_probs(self.language_model, sequences, probe, *options)

    def stop_sharing(self, reason: str) -> Probe:
        """Pad sequences from now on, and warn; ValueError where `share_prefix` is True."""
        sentence = f"prefixes are no longer shared in the {self.language_model.name} model, for {reason}"
        if self.share_prefix is True:
            raise ValueError(f"{sentence}: use share_prefix = 'auto'.")
        warnings.warn(f"{sentence}; its sequences are padded.", stacklevel=3)
        assert self.probe is not None
        self.probes = {key: probe.padded(reason) for key, probe in self.probes.items()}
        self.probe = self.probe.padded(reason)
        return self.probe

    def check(self, sequences: ScoredSequences) -> Probe:
        """Probe the model where needed, and raise what can be said before it runs on these sequences."""
        with probing_lock:
            self.probe = probe = self.find_probe(sequences.ids.device)
        if self.policy and self.policy.probe and self.policy.probe.vocab_size != probe.vocab_size:
            raise ValueError(
                f"the reference has a vocabulary of {probe.vocab_size} tokens but the policy one of "
                f"{self.policy.probe.vocab_size}: give a reference with the policy's tokenizer."
            )
        check_vocabulary(sequences.on_cpu.ids, probe.vocab_size)
        check_vocabulary(sequences.on_cpu.target, probe.vocab_size)
        longest, limit = sequences.ids.shape[1], self.language_model.max_positions
        if limit is not None and longest > limit:
            raise ValueError(
                f"a sequence has {longest} tokens before its last, but the model's table of positions ends "
                f"at {limit}: shorten the sequences."
            )
        return probe

    def find_probe(self, device: torch.device) -> Probe:
        """What is known of the model in its present state, after probing it where nothing is."""
        key = ProbeKey.of_model(self.language_model, device)
        if key not in self.probes:
            choose_impl(self.impl, device)  # raises where it is not available
            policy = None if self.policy is None else self.policy.language_model.model
            options = (self.impl, self.share_prefix, policy, self.is_eval)
            probe = probe_model(self.language_model, key, *options)
            if key.trains is not None:
                self.warn_of_left_out_loss()
            # what holds with gradients holds without, and policy and reference 'adapter' should do the same
            self.probes |= {key: probe, key.without_gradients(): probe}
        return self.probes[key]

    def check_aux_loss(self, coef: float | None) -> float | None:
        """The coefficient; ValueError if it is none, or if the model has no loss that balances experts."""
        check_router_aux_loss_coef(coef)
        if coef and (reason := self.language_model.why_no_aux_loss()) is not None:
            raise ValueError(
                f"router_aux_loss_coef should be 0 or None where no loss balances experts ({reason}), but it "
                f"is {coef}: leave it out."
            )
        return coef

    def warn_of_left_out_loss(self) -> None:
        """Warn if the model's configuration asks for a loss that balances experts, but cannot have it."""
        own = self.language_model.own_aux_loss_coef
        if self.router_aux_loss_coef is None and own and not self.aux_loss_coef:
            warnings.warn(
                "the loss should have a term that balances experts, for which the model's configuration asks "
                f"(output_router_logits, router_aux_loss_coef = {own}), but it is left out "
                f"({self.language_model.why_no_aux_loss()}): add it, or set router_aux_loss_coef = 0.",
                stacklevel=4,
            )

    @property
    def aux_loss_coef(self) -> float:
        """What the loss that balances experts is multiplied by; 0 where it is not computed."""
        if self.router_aux_loss_coef is not None:
            return self.router_aux_loss_coef
        own = self.language_model.own_aux_loss_coef
        return own if own and self.language_model.why_no_aux_loss() is None else 0.0

    def add_aux_loss(self, loss: Tensor, log_probs: SequenceLogProbs, batch: Batch) -> Tensor:
        """Add the loss that balances experts, where it is computed, by the batch's share of its step."""
        if log_probs.aux_loss is None:
            return loss
        return loss + self.aux_loss_coef * batch.share_of_step * log_probs.aux_loss

    @property
    def trains_head(self) -> bool:
        """Whether gradients are needed of an output head that is applied outside the model."""
        head = self.language_model.output_head() if self.probe and self.probe.head_applies else None
        return head is not None and head.weight.requires_grad and torch.is_grad_enabled()

    @property
    def tree_options(self) -> TreeOptions | None:
        """How trees may be built ahead of the forward pass; None if sequences are padded."""
        if self.probe is not None:
            return self.probe.tree
        return TreeOptions(self.language_model.max_positions) if self.share_prefix else None

    def explain(self) -> str:
        """Which paths are in use and why not the others, in plain words."""
        name, probe = self.language_model.name, self.probe
        if probe is None:
            return f"{name} model, not probed before the first call"
        explanation = f"{name} model; {probe.explain()}"
        if probe.tree is not None and self.language_model.compiles_attention():
            explanation += "; a tree breaks its compiled attention up, share_prefix = False does not"
        return explanation


def sequence_log_probs(
    model: nn.Module, seq: Tensor, scored_mask: Tensor, seq_mask: Tensor | None = None
) -> Float[Tensor, "b"]:
    """Sum of the log-probs of each row's scored tokens, in nats. Differentiable.

    That is `log p(scored tokens | the real tokens before them)`, the `log π(y | x)` of Rafailov et al. 2023
    (arXiv 2305.18290), eq. 7.

    Args:
        model: any autoregressive model, as for `DPO`. Its dropout stays as it is.
        seq: Int[b n] token ids.
        scored_mask: Bool[b n], True on tokens to be scored, in any pattern; the first real token never is.
        seq_mask: Bool[b n], True on real tokens; padding may stand anywhere. Without it all are real.

    Raises:
        TypeError, ValueError: arguments that do not fit, before any forward pass.
    """
    seq = check_ids("seq", seq)
    scored = check_mask("scored_mask", scored_mask, seq, "seq")
    real = torch.ones_like(scored) if seq_mask is None else check_mask("seq_mask", seq_mask, seq, "seq")
    return Scorer(model, is_eval=False)(ScoredSequences.from_padded(seq, scored, real)).sums
