"""Weighted sums of losses, and a user's own function as a loss."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpo_wrapper.losses.base import Loss, PairLoss, is_number
from dpo_wrapper.losses.inputs import PairLogProbs

PairFunction = Callable[[PairLogProbs], Tensor]
WeightedLosses = tuple[tuple[Loss, float], ...]
LossArgument = Loss | PairFunction | Sequence[tuple[Loss | PairFunction, float]]
"""What users may give as a loss."""

DATA = {
    "preference": ("pairs", "PreferenceBatch"),
    "ranked": ("ranked lists", "RankedBatch"),
    "unpaired_preference": ("rows with a label", "UnpairedBatch"),
}
"""For each type of data its name in error messages, and the batch that holds it."""


@dataclass(frozen=True)
class FunctionLoss(PairLoss):
    """A user's own function from `PairLogProbs` to Float[p], one value per pair.

    Attributes of the function tell what its class would: `needs_reference = False`, `has_margin = True`,
    `is_per_pair = False`, `has_rewards = False`, and `reward`, a function of what `Loss.reward` is given,
    without which rewards are log-ratios. With `is_deterministic = True`, `DPO` may call it ahead of time,
    which saves memory while the output head trains (see `Loss.is_deterministic`). An `nn.Module` is called
    like any function, but not registered: its parameters and buffers are not those of `DPO`, so the user
    trains, moves and saves them.
    """

    is_deterministic = False
    function: PairFunction

    def __post_init__(self) -> None:
        for name in ("needs_reference", "has_margin", "is_per_pair", "is_deterministic", "has_rewards"):
            object.__setattr__(self, name, bool(getattr(self.function, name, getattr(self, name))))

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        """One value per pair; ValueError if the function gives something else."""
        values = self.function(pairs)
        self.check_shape("loss", "pair", values, pairs.chosen)
        return values

    def check_shape(self, noun: str, unit: str, values: object, like: Tensor) -> None:
        """Raise ValueError if the user's function did not give one value per pair or completion."""
        if not (isinstance(values, Tensor) and values.shape == like.shape):
            received = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            name = getattr(self.function, "__name__", repr(self.function)) + ".reward" * (noun == "reward")
            raise ValueError(
                f"a {noun} should give one value per {unit}, shape {tuple(like.shape)}, but {name} gave "
                f"{received}: leave the mean to DPO."
            )

    def reward(self, policy: Tensor, reference: Tensor | None, length: Tensor) -> Tensor:
        """What the function's attribute `reward` gives, or else the log-ratio."""
        values = getattr(self.function, "reward", super().reward)(policy, reference, length)
        self.check_shape("reward", "completion", values, policy)
        return values


def as_loss(value: object) -> Loss | None:
    """A loss as it is, a function as a `FunctionLoss`, and None for anything else."""
    if isinstance(value, Loss):
        return value
    return FunctionLoss(value) if callable(value) and not isinstance(value, type) else None


def as_weighted_losses(loss: LossArgument) -> WeightedLosses:
    """One loss or a list of `(loss, weight)` as a checked tuple of `(loss, weight)`.

    Raises:
        TypeError: what is no loss, or losses of different types of data.
        ValueError: a weight that is not positive.
    """
    single = as_loss(loss)
    terms: Any = loss if single is None else [(single, 1.0)]
    if not (isinstance(terms, (list, tuple)) and terms):
        remedy = f": write {loss.__name__}()." if isinstance(loss, type) else "."
        raise TypeError(
            "loss should be one of dpo_wrapper.losses, a function or a list of (loss, weight), "
            f"but it is {loss!r}{remedy}"
        )
    checked: list[tuple[Loss, float]] = []
    for term in terms:
        term_loss = as_loss(term[0]) if isinstance(term, (list, tuple)) and len(term) == 2 else None
        if term_loss is None:
            raise TypeError(f"a combined loss should be a list of (loss, weight), but it holds {term!r}.")
        if not (is_number(term[1]) and term[1] > 0):
            name = type(term_loss).__name__
            raise ValueError(f"the weight of {name} should be positive, but it is {term[1]!r}.")
        checked.append((term_loss, float(term[1])))
    if len({term_loss.log_probs_type for term_loss, _ in checked}) > 1:
        raise TypeError(
            f"losses of a sum should learn from data of one type, but {join_names(checked)} learn from "
            "different data: combine losses of one type."
        )
    return tuple(checked)


def join_names(terms: Iterable[tuple[Loss, float]]) -> str:
    """The class names of weighted losses, for error messages."""
    return " and ".join(type(loss).__name__ for loss, _ in terms)


class CombinedLoss(nn.Module):
    """The weighted sum of losses, one value per pair, list or row, times the data's own weights.

    A module, so that checkpoints hold the state of losses that have one (`BetaDPO`).

    Attributes:
        terms: the losses and their weights; all take the same type of data.
        dataset_type: 'preference', 'ranked' or 'unpaired_preference'.
        reward_loss: the first loss that has rewards, which are those of the sum; None if no loss has any.
    """

    def __init__(self, loss: LossArgument) -> None:
        super().__init__()
        self.terms = as_weighted_losses(loss)
        self.first_loss = self.terms[0][0]
        self.dataset_type: str = self.first_loss.log_probs_type.dataset_type
        builtin = [term for term, _ in self.terms if not isinstance(term, FunctionLoss)]
        states = [value for term in builtin for value in vars(term).values() if isinstance(value, nn.Module)]
        self.states = nn.ModuleList(states)
        self.needs_reference = any(term.needs_reference for term, _ in self.terms)
        self.is_deterministic = all(term.is_deterministic for term, _ in self.terms)
        self.is_per_pair = all(term.is_per_pair for term, _ in self.terms)
        self.reward_loss = next((term for term, _ in self.terms if term.has_rewards), None)

    def forward(self, log_probs: Any) -> Float[Tensor, "_"]:
        """One value per pair, list or row, in nats.

        Args:
            log_probs: `PairLogProbs`, `RankedLogProbs` or `UnpairedLogProbs`, as `dataset_type` says.
        """
        if isinstance(log_probs, PairLogProbs):
            self.check_columns(log_probs.margins is not None, log_probs.weights is not None)
        values = torch.stack([weight * term(log_probs) for term, weight in self.terms]).sum(dim=0)
        return values if log_probs.weights is None else values * log_probs.weights

    def check_columns(self, has_margins: bool, has_weights: bool) -> None:
        """Raise ValueError for margins or weights of pairs that could not act."""
        if has_weights and not self.is_per_pair:
            batchwise = [term for term in self.terms if not term[0].is_per_pair]
            verb = "compares" if len(batchwise) == 1 else "compare"
            raise ValueError(
                f"weights of pairs have no meaning for {join_names(batchwise)}, which {verb} the pairs of a "
                "batch with one another: leave the weights out or take another loss."
            )
        if has_margins and not any(term.has_margin for term, _ in self.terms):
            verb = "has" if len(self.terms) == 1 else "have"
            raise ValueError(
                f"margins have no meaning for {join_names(self.terms)}, which {verb} no logit to subtract "
                "them from: leave the margins out or take a loss such as Sigmoid."
            )

    def observe(self, log_probs: Any, is_whole_step: bool) -> None:
        """Let losses with a state see the log-probs of a forward pass, which may be the whole step."""
        for term, _ in self.terms:
            term.observe(log_probs)
        if is_whole_step:
            self.end_step()

    def end_step(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Let losses with a state end an optimizer step; `reduce` sums a tensor over processes."""
        for term, _ in self.terms:
            term.end_step(reduce)

    def discard_step(self) -> None:
        """Let losses with a state forget a step that has left the weights alone."""
        for term, _ in self.terms:
            term.discard_step()

    def check_dataset_type(self, dataset_type: str) -> None:
        """Raise TypeError for data of another type than the losses take."""
        if dataset_type != self.dataset_type:
            noun, batch_name = DATA[self.dataset_type]
            received, _ = DATA[dataset_type]
            raise TypeError(
                f"{type(self.first_loss).__name__} learns from {noun}, but it was given {received}: make a "
                f"{batch_name} of them."
            )

    def check_beta(self, beta: object) -> None:
        """Raise ValueError for a `beta` of `DPO` that is no scale, or that these losses do not have."""
        if not (is_number(beta) and beta > 0):
            raise ValueError(f"beta should be a positive number, but it is {beta!r}.")
        loss_beta = next((float(term.beta) for term, _ in self.terms if hasattr(term, "beta")), None)
        if beta in (0.1, loss_beta):
            return
        if loss_beta is None:
            raise ValueError(f"beta = {beta} has no effect beside a loss without one: leave it out.")
        raise ValueError(
            f"beta = {beta} has no effect beside a loss with beta = {loss_beta}: give it to the loss alone."
        )

    def check_ld_alpha(self, ld_alpha: object) -> float:
        """The weight of tokens beyond the shorter completion; ValueError where it could not act."""
        if not (is_number(ld_alpha) and 0 <= ld_alpha <= 1):
            raise ValueError(f"ld_alpha should be a number from 0 to 1, but it is {ld_alpha!r}.")
        if ld_alpha < 1 and self.dataset_type != "preference":
            raise ValueError(
                f"ld_alpha compares the two sides of a pair, and {type(self.first_loss).__name__} learns "
                "from other data: leave it out."
            )
        return float(ld_alpha)

    def check_wpo(self, wpo: object) -> bool:
        """Whether pairs are weighted by WPO; TypeError or ValueError where they could not be."""
        if not isinstance(wpo, bool):
            raise TypeError(f"wpo should be True or False, but it is {wpo!r}.")
        if wpo and self.dataset_type != "preference":
            raise ValueError(
                f"wpo weights pairs, and {type(self.first_loss).__name__} learns from other data: leave it "
                "out."
            )
        if wpo:
            self.check_columns(has_margins=False, has_weights=True)
        return wpo
