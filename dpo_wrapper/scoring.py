"""Log-probs of sequences under a model: hidden states of the scored positions, then the fused gather."""

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dpo_wrapper.log_probs import implementation, log_probs_from_logits, token_log_probs
from dpo_wrapper.models import difference, language_model, quiet
from dpo_wrapper.sequences import ScoredSequences
from dpo_wrapper.validation import check_ids, check_mask, check_vocabulary


class Scorer:
    """Scores sequences under one model, after looking once at how the model behaves.

    That look is two rows of a few tokens, in eval mode and without gradients. It refuses a model that sees ahead or
    returns something else than logits, and it decides whether the output head may be applied to scored positions
    alone: only if `head(hidden)` reproduces the model's own logits. With `frozen` it also refuses a model whose
    output depends on anything that trains.
    """

    def __init__(self, model: nn.Module, impl: str = "auto", *, frozen: bool = False) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"a model should be a torch.nn.Module, but it is a {type(model).__name__}.")
        implementation(impl)
        self.language_model = language_model(model)
        self.impl = impl
        self.frozen = frozen
        self.vocab_size: int | None = None
        self.head_applies = False

    def __call__(self, sequences: ScoredSequences) -> Float[Tensor, "s"]:
        """Sum of the scored tokens' log-probs for each sequence, in nats."""
        return sequences.sums(self.token_scores(sequences))

    def token_scores(self, sequences: ScoredSequences) -> Float[Tensor, "t"]:
        self.check(sequences)
        where = (sequences.row, sequences.source)
        head = self.language_model.head()
        if head is None or not self.head_applies:
            logits = self.valid_logits(sequences.ids)
            return log_probs_from_logits(logits[where], sequences.target)
        hidden = self.language_model.hidden(sequences.ids)[where]
        return token_log_probs(hidden, head.weight, sequences.target, impl=self.impl, **head.options)

    def check(self, sequences: ScoredSequences) -> None:
        """Everything that can be said before the model runs on these sequences."""
        if self.vocab_size is None:
            self.look_at_model(sequences.ids.device)
        assert self.vocab_size is not None
        check_vocabulary(sequences.ids, self.vocab_size)
        check_vocabulary(sequences.target, self.vocab_size)
        longest, most = sequences.ids.shape[1], self.language_model.max_positions
        if most is not None and longest > most:
            raise ValueError(
                f"a sequence has {longest} tokens before its last, but the model's table of positions ends at "
                f"{most}: shorten the sequences."
            )

    def valid_logits(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        logits = self.language_model.logits(ids)
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"the model should return logits, a float tensor or an output with .logits, not {got}.")
        if logits.ndim != 3 or logits.shape[:2] != ids.shape:
            raise TypeError(
                f"the model should return logits of shape (b, n, v), for ids of shape {tuple(ids.shape)}, "
                f"but their shape is {tuple(logits.shape)}."
            )
        return logits

    def look_at_model(self, device: torch.device) -> None:
        model = self.language_model
        known = model.vocab_size or 2
        row = [(k * 7919) % known for k in range(min(5, model.max_positions or 5))]
        ids = torch.tensor([row, [*row[:-1], (row[-1] + 1) % known]], device=device)
        with quiet(model.model), torch.set_grad_enabled(self.frozen):
            logits = self.valid_logits(ids)
            if self.frozen and logits.requires_grad:
                raise ValueError(
                    "the reference's output depends on parameters that train, so it would follow the policy: "
                    "give a separately built model as reference = module."
                )
            _, looks_ahead = difference(logits[0, :-1], logits[1, :-1])
            if looks_ahead:
                raise ValueError(
                    "the model is not autoregressive: changing a token changes the logits before it. "
                    "Use a causal model (in x-transformers a Decoder)."
                )
            if (head := model.head()) is not None:
                worst, differs = difference(head.logits(model.hidden(ids)), logits)
                self.head_applies = not differs
                if differs:
                    warnings.warn(
                        f"{model.name} model: applying the output head to the hidden states does not give the "
                        f"model's own logits (relative difference {worst:.1e}), so all its logits are computed.",
                        stacklevel=2,
                    )
        self.vocab_size = min(logits.shape[-1], model.vocab_size or logits.shape[-1])


def sequence_log_probs(
    model: nn.Module, seq: Tensor, scored_mask: Tensor, seq_mask: Tensor | None = None
) -> Float[Tensor, "b"]:
    """Sum of the log-probs of each row's scored tokens, in nats: `log p(scored tokens | the real tokens before them)`.

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7's `log π(y | x)`. Differentiable.

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
