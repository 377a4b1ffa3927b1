"""Log-probs of sequences under a model: hidden states of the scored positions, then the fused gather."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpo_wrapper.log_probs import implementation, log_probs_from_logits, token_log_probs
from dpo_wrapper.look import look_at, valid_logits
from dpo_wrapper.models import language_model
from dpo_wrapper.modes import one_arithmetic
from dpo_wrapper.sequences import ScoredSequences
from dpo_wrapper.validation import check_ids, check_mask, check_vocabulary, kind


class Scorer:
    """Scores sequences under one model, after looking once on each device at how the model behaves.

    That look refuses what is no causal language model, and it decides whether the output head may be applied
    to scored positions alone: only if `head(hidden)` reproduces the model's own logits and trains what they
    train. It also refuses a reference that is not `apart_from` the policy, or has another vocabulary.
    """

    def __init__(self, model: nn.Module, impl: str = "auto", *, apart_from: "Scorer | None" = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"a model should be a torch.nn.Module, but it is {kind(model)}: load or build it first."
            )
        implementation(impl)
        self.language_model = language_model(model)
        self.impl = impl
        self.apart_from = apart_from
        self.vocab_size: int | None = None
        self.looked_on: torch.device | None = None
        self.head_applies = False

    def __call__(self, sequences: ScoredSequences) -> Float[Tensor, "s"]:
        """Sum of the scored tokens' log-probs for each sequence, in nats."""
        self.check(sequences)
        return self.score(sequences)

    def score(self, sequences: ScoredSequences) -> Float[Tensor, "s"]:
        """The same for sequences that have been checked."""
        return sequences.sums(self.token_scores(sequences))

    def token_scores(self, sequences: ScoredSequences) -> Float[Tensor, "t"]:
        where = (sequences.row, sequences.source)
        head = self.language_model.head()
        with one_arithmetic():
            if head is None or not self.head_applies:
                logits = valid_logits(self.language_model.logits(sequences.ids), sequences.ids)
                return log_probs_from_logits(logits[where], sequences.target)
            hidden = self.language_model.hidden(sequences.ids)[where]
        return token_log_probs(hidden, head.weight, sequences.target, impl=self.impl, **head.options)

    def check(self, sequences: ScoredSequences) -> None:
        """Everything that can be said before the model runs on these sequences."""
        device = sequences.ids.device
        if device != self.looked_on:
            other = None if self.apart_from is None else self.apart_from.language_model.model
            size, self.head_applies = look_at(self.language_model, device, other)
            if self.apart_from is not None and self.apart_from.vocab_size not in (None, size):
                raise ValueError(
                    f"the reference has a vocabulary of {size} tokens but the policy one of "
                    f"{self.apart_from.vocab_size}: give a reference with the policy's tokenizer."
                )
            self.vocab_size, self.looked_on = size, device
        assert self.vocab_size is not None
        check_vocabulary(sequences.ids, self.vocab_size)
        check_vocabulary(sequences.target, self.vocab_size)
        longest, most = sequences.ids.shape[1], self.language_model.max_positions
        if most is not None and longest > most:
            raise ValueError(
                f"a sequence has {longest} tokens before its last, but the model's table of positions ends "
                f"at {most}: shorten the sequences."
            )


def sequence_log_probs(
    model: nn.Module, seq: Tensor, scored_mask: Tensor, seq_mask: Tensor | None = None
) -> Float[Tensor, "b"]:
    """Sum of the log-probs of each row's scored tokens, in nats.

    That is `log p(scored tokens | the real tokens before them)`, the `log π(y | x)` of Rafailov et al. 2023
    (arXiv 2305.18290), eq. 7. Differentiable.

    Args:
        model: any autoregressive model, as for `DPO`; dropout is as the model has it at the moment.
        seq: Int[b n] token ids.
        scored_mask: Bool[b n], True on tokens to be scored, in any pattern; the first real token never is.
        seq_mask: Bool[b n], True on real tokens; padding may stand anywhere. All are real without it.

    Raises:
        TypeError, ValueError: what does not fit, before any forward pass.
    """
    seq = check_ids("seq", seq)
    scored_mask = check_mask("scored_mask", scored_mask, seq, "seq")
    if seq_mask is None:
        seq_mask = torch.ones_like(scored_mask)
    sequences = ScoredSequences.from_padded(seq, scored_mask, check_mask("seq_mask", seq_mask, seq, "seq"))
    return Scorer(model)(sequences)
