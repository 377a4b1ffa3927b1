"""Log-probs of sequences under a model: hidden states of the scored positions, then the fused gather."""

import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dpo_wrapper.batches.sequences import ScoredSequences, TreePlan
from dpo_wrapper.log_probs import FusedLoss, Impl, choose_impl, gather_log_probs, token_log_probs
from dpo_wrapper.models.base import language_model
from dpo_wrapper.models.eval_mode import one_arithmetic, quiet
from dpo_wrapper.prefix_tree.attention import NotShareable
from dpo_wrapper.scoring.fused_loss import Foretold
from dpo_wrapper.scoring.probe import difference, look_at, rounding, valid_logits
from dpo_wrapper.validation import check_ids, check_mask, check_vocabulary, kind

Scores = tuple[Tensor, dict[str, Tensor]]
"""One log-prob for each scored token, and by name what else was asked for."""

_looking = threading.RLock()
"""A model is looked at by one thread at a time, while others wait for what it finds."""


KERNELS = {
    "flex": "FlexAttention where attention is plain, else along each path",
    "branches": "torch's kernel on each long branch where attention is plain, else along each path",
    "own": "the model's own attention along each path",
}
FASTER = {"cuda": ("flex",), "cpu": ("branches",)}
"""What is better than a model's own attention if it gives the same, by kind of device."""


class Scorer:
    """Scores sequences under one model, after looking once on each device at how the model behaves.

    That look refuses what is no causal language model, and it decides whether the output head may be applied
    to scored positions alone: only if `head(hidden)` reproduces the model's own logits and trains what they
    train. It also refuses a reference that is not `apart_from` the policy, or has another vocabulary.
    """

    def __init__(
        self,
        model: nn.Module,
        impl: Impl = "auto",
        *,
        apart_from: "Scorer | None" = None,
        share: str | bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"a model should be a torch.nn.Module, but it is {kind(model)}: load or build it first."
            )
        choose_impl(impl)
        self.language_model = language_model(model)
        self.impl = impl
        self.apart_from = apart_from
        self.share = share
        self.why_padded: str | None = "share_prefix is False"
        self.kernel = "own"
        self.least: int | None = None
        self.vocab_size: int | None = None
        self.looked_on: torch.device | None = None
        self.head_applies = False

    def __call__(self, sequences: ScoredSequences, foretold: Foretold | None = None) -> Float[Tensor, "s"]:
        """Sum of the scored tokens' log-probs for each sequence, in nats."""
        self.check(sequences)
        return sequences.sums(self.token_scores(sequences, foretold))

    def token_scores(
        self, sequences: ScoredSequences, foretold: Foretold | None = None
    ) -> Float[Tensor, "t"]:
        """The log-prob of each scored token, over a tree or over padded rows, for sequences that have been
        checked; `foretold` is what the scores of all of them will be made into."""
        return self.token_scores_and(sequences, (), foretold)[0]

    def token_scores_and(
        self, sequences: ScoredSequences, extras: Sequence[str], foretold: Foretold | None = None
    ) -> Scores:
        """The same, and by name what else `token_log_probs` says of each scored token, without gradients."""
        if self.why_padded is not None or not len(sequences.target):
            where = sequences.row * sequences.ids.shape[1] + sequences.source
            ahead = None if foretold is None else partial(foretold.over_rows, sequences)
            return self.scores_at(partial(self.padded, sequences), where, sequences.target, extras, ahead)
        tree = sequences.over_tree(self.plan)
        states = partial(self.language_model.over_tree, tree.layout)
        ahead = None if foretold is None else partial(foretold.over_tree, sequences, tree)
        scores, more = self.scores_at(states, tree.source, tree.target, extras, ahead)
        return scores.index_select(0, tree.entry), {
            name: values.index_select(0, tree.entry) for name, values in more.items()
        }

    def explain(self) -> str:
        """Which paths are in use, and why not the others."""
        name = self.language_model.name
        if self.looked_on is None:
            return f"{name} model, not looked at before the first call"
        head = (
            "the head is applied to scored positions alone"
            if self.head_applies
            else "all logits are computed"
        )
        if self.why_padded is None:
            return f"{name} model; shared prefixes are computed once, by {KERNELS[self.kernel]}; {head}"
        return f"{name} model; sequences are padded, for {self.why_padded}; {head}"

    @property
    def plan(self) -> TreePlan:
        """How this model takes trees."""
        return TreePlan(self.language_model.max_positions, self.kernel, self.least)

    @property
    def tree_plan(self) -> TreePlan | None:
        """How batches may be laid out ahead for this model; None if it takes padded rows."""
        shares = self.why_padded is None or (self.share and self.looked_on is None)
        return self.plan if shares else None

    def padded(self, sequences: ScoredSequences, hidden: bool) -> Float[Tensor, "s n _"]:
        if hidden:
            return self.language_model.hidden(sequences.ids)
        return valid_logits(self.language_model.logits(sequences.ids), sequences.ids)

    def scores_at(
        self,
        states: Callable[[bool], Tensor],
        where: Int[Tensor, "t"],
        targets: Int[Tensor, "t"],
        extras: Sequence[str],
        ahead: Callable[[], FusedLoss] | None = None,
    ) -> Scores:
        """Log-probs of targets from the hidden states (or, if False is asked for, logits) at places of their
        rows, laid end to end; `ahead` is asked while the head trains."""
        head = self.language_model.head()
        with one_arithmetic(self.language_model.model):
            if head is None or not self.head_applies:
                found = gather_log_probs(states(False).flatten(0, 1), where, targets, extras)
                return found if extras else (found, {})
            hidden = states(True).flatten(0, 1).index_select(0, where)
        trains = torch.is_grad_enabled() and head.weight.requires_grad
        told = ahead() if ahead is not None and trains else None
        options = {"impl": self.impl, "extras": extras, "fused_loss": told, **head.options}
        found = token_log_probs(hidden, head.weight, targets, **options)
        return found if extras else (found, {})

    def check(self, sequences: ScoredSequences) -> None:
        """Everything that can be said before the model runs on these sequences."""
        device = sequences.ids.device
        with _looking:
            if device != self.looked_on:
                self.look(device)
                self.looked_on = device
        assert self.vocab_size is not None
        check_vocabulary(sequences.ids, self.vocab_size)
        check_vocabulary(sequences.target, self.vocab_size)
        longest, most = sequences.ids.shape[1], self.language_model.max_positions
        if most is not None and longest > most:
            raise ValueError(
                f"a sequence has {longest} tokens before its last, but the model's table of positions ends "
                f"at {most}: shorten the sequences."
            )

    def look(self, device: torch.device) -> None:
        """Find out how the model behaves on a device."""
        choose_impl(self.impl, device)  # raises if that cannot be there
        other = None if self.apart_from is None else self.apart_from.language_model.model
        size, self.head_applies = look_at(self.language_model, device, other)
        if self.apart_from is not None and self.apart_from.vocab_size not in (None, size):
            raise ValueError(
                f"the reference has a vocabulary of {size} tokens but the policy one of "
                f"{self.apart_from.vocab_size}: give a reference with the policy's tokenizer."
            )
        self.vocab_size = size
        if self.share:
            self.try_sharing(device)

    def try_sharing(self, device: torch.device) -> None:
        """Share prefixes if the model's log-probs allow it; else say why not."""
        self.kernel = "own"
        reason = self.why_not_shared(device)
        if reason is None:
            for self.kernel in (*FASTER.get(device.type, ()), "own"):
                if self.kernel == "own" or self.why_not_shared(device) is None:
                    break
        self.why_padded = reason
        name = self.language_model.name
        if reason is not None and self.share is True:
            raise ValueError(
                f"prefixes are not shared in the {name} model, for {reason}: use share_prefix = 'auto'."
            )
        if reason is not None and name != "module":
            warnings.warn(
                f"prefixes are not shared in the {name} model, for {reason}; its sequences are padded.",
                stacklevel=2,
            )

    @torch.no_grad()
    def why_not_shared(self, device: torch.device) -> str | None:
        """Score two tiny pairs over a tree and over padded rows: None if they agree, else what happened."""
        model = self.language_model
        if not model.reaches_attention:
            return "the attention of a plain module cannot be reached"
        assert self.vocab_size is not None
        n = min(40, model.max_positions or 40)
        ids = torch.randint(self.vocab_size, (4, n), generator=torch.Generator().manual_seed(0))
        ids[1, : n // 2], ids[3, : n // 4] = ids[0, : n // 2], ids[2, : n // 4]
        everything = torch.ones_like(ids, dtype=torch.bool)
        sequences = ScoredSequences.from_padded(ids, everything, everything).to(device)
        scores = []
        self.least = 0  # so that the kernel is tried on short branches too
        try:
            with quiet(model.model):
                for self.why_padded in ("it is being tried", None):
                    scores.append(self.token_scores(sequences))
        except NotShareable as error:
            return str(error)
        except Exception as error:  # whatever a model's code may raise, there is the plain path
            return f"{type(error).__name__}: {error}"
        finally:
            self.least = None
        worst, differs = difference(scores[1], scores[0], rounding(device, model.model))
        return f"its log-probs would differ (by {worst:.1e}, relatively)" if differs else None


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
