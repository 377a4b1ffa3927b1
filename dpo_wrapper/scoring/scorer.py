"""Log-probs of sequences under a model: hidden states of the scored positions, then the fused gather."""

import threading
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpo_wrapper.batches.sequences import ScoredSequences, SequenceLogProbs
from dpo_wrapper.log_probs import FusedLoss, Impl, choose_impl
from dpo_wrapper.models import language_model
from dpo_wrapper.prefix_tree.layout import TreeOptions
from dpo_wrapper.scoring.probe import SharePrefix, probe_model
from dpo_wrapper.scoring.token_log_probs import Probe, compute_log_probs
from dpo_wrapper.validation import check_ids, check_mask, check_vocabulary, describe_type

KERNELS = {
    "flex": "FlexAttention where attention is plain, else along each path",
    "branches": "torch's kernel on each long branch where attention is plain, else along each path",
    "model": "the model's own attention along each path",
}
"""The kernels of attention over a tree, for `explain`."""

_probing = threading.RLock()
"""A model is probed by one thread at a time; others wait for the result."""


class Scorer:
    """Computes log-probs of sequences under one model. The first call on each device probes the model.

    For a reference, `policy` is the policy's scorer: the two should have one vocabulary, and the reference's
    output should not depend on parameters that train in the policy.
    """

    def __init__(
        self,
        model: nn.Module,
        impl: Impl = "auto",
        share_prefix: SharePrefix = False,
        policy: "Scorer | None" = None,
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
        self.probe: Probe | None = None

    def __call__(
        self, sequences: ScoredSequences, extras: Sequence[str] = (), fused_loss: FusedLoss | None = None
    ) -> SequenceLogProbs:
        """Log-probs of the sequences, after `check`; arguments as in `compute_log_probs`."""
        probe = self.check(sequences)
        if torch.is_grad_enabled():
            torch.clear_autocast_cache()  # before 2.11, torch uses casts made without gradients again
        return compute_log_probs(self.language_model, sequences, probe, extras, fused_loss)

    def check(self, sequences: ScoredSequences) -> Probe:
        """Probe the model where needed, and raise what can be said before it runs on these sequences."""
        device = sequences.ids.device
        with _probing:
            if self.probe is None or device != self.probe.device:
                choose_impl(self.impl, device)  # raises where it is not available
                policy = None if self.policy is None else self.policy.language_model.model
                self.probe = probe_model(self.language_model, device, self.impl, self.share_prefix, policy)
            probe = self.probe
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
        head = "all logits are computed"
        if probe.head_applies:
            head = "the head is applied to scored positions alone"
        if probe.tree is None:
            return f"{name} model; sequences are padded, for {probe.why_padded}; {head}"
        return f"{name} model; shared prefixes are computed once, by {KERNELS[probe.tree.kernel]}; {head}"


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
    return Scorer(model)(ScoredSequences.from_padded(seq, scored, real)).sums
