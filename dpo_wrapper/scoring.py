"""Log-probs of sequences under a model: hidden states of the scored positions, then the fused gather."""

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dpo_wrapper.log_probs import implementation, log_probs_from_logits, token_log_probs
from dpo_wrapper.models import (
    TOLERANCE,
    LanguageModel,
    OutputHead,
    difference,
    language_model,
    one_arithmetic,
    quiet,
)
from dpo_wrapper.sequences import ScoredSequences
from dpo_wrapper.validation import check_ids, check_mask, check_vocabulary


class Scorer:
    """Scores sequences under one model, after looking once at how the model behaves.

    That look is two rows of a few tokens, in eval mode and without gradients. It refuses a model that sees ahead or
    returns something else than logits, and it decides whether the output head may be applied to scored positions
    alone: only if `head(hidden)` reproduces the model's own logits. It also refuses a model whose output
    depends on a parameter that trains in `apart_from`.
    """

    def __init__(self, model: nn.Module, impl: str = "auto", *, apart_from: nn.Module | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"a model should be a torch.nn.Module, but it is a {type(model).__name__}.")
        implementation(impl)
        self.language_model = language_model(model)
        self.impl = impl
        self.apart_from = apart_from
        self.vocab_size: int | None = None
        self.head_applies = False

    def __call__(self, sequences: ScoredSequences) -> Float[Tensor, "s"]:
        """Sum of the scored tokens' log-probs for each sequence, in nats."""
        return sequences.sums(self.token_scores(sequences))

    def token_scores(self, sequences: ScoredSequences) -> Float[Tensor, "t"]:
        self.check(sequences)
        where = (sequences.row, sequences.source)
        head = self.language_model.head()
        with one_arithmetic():
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
            raise TypeError(
                f"the model should return logits, a float tensor or an output with .logits, not {got}."
            )
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
        with quiet(model.model), torch.set_grad_enabled(self.apart_from is not None):
            logits = self.valid_logits(ids)
            if self.apart_from is not None and depends_on(logits, self.apart_from):
                raise ValueError(
                    "the reference's output depends on parameters that train, so it would follow the policy: "
                    "give a separately built model as reference = module."
                )
            # rounding alone may differ between the two rows, in float32 even inside float64 models
            worst, _ = difference(logits[0, :-1], logits[1, :-1])
            if worst > max(TOLERANCE[torch.float32], TOLERANCE.get(logits.dtype, 0.1)):
                raise ValueError(
                    "the model is not autoregressive: changing a token changes the logits before it. "
                    "Use a causal model (in x-transformers a Decoder)."
                )
            if (head := model.head()) is not None:
                reason = why_not(model, head, ids, logits)
                self.head_applies = reason is None
                if reason is not None:
                    warnings.warn(
                        f"all logits of the {model.name} model are computed, for {reason}.", stacklevel=2
                    )
        self.vocab_size = min(logits.shape[-1], model.vocab_size or logits.shape[-1])


def depends_on(output: Tensor, model: nn.Module) -> bool:
    """Whether a trained parameter of the model has a part in the output."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not (trained and output.requires_grad):
        return False
    gradients = torch.autograd.grad(output.sum(), trained, allow_unused=True)
    return any(gradient is not None for gradient in gradients)


def why_not(model: LanguageModel, head: OutputHead, ids: Tensor, logits: Tensor) -> str | None:
    """Why the head may not be applied to hidden states outside the model; None if it may."""
    try:
        got = head.logits(model.hidden(ids))
    except Exception as error:  # whatever a model's code may raise, there is the plain path
        return f"its hidden states cannot be had ({type(error).__name__}: {error})"
    if got.shape != logits.shape:
        return f"its head gives logits of shape {tuple(got.shape)} instead of {tuple(logits.shape)}"
    worst, differs = difference(got, logits)
    return f"its head alone gives other logits (relative difference {worst:.1e})" if differs else None


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
