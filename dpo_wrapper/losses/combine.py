"""Sums of losses, and a user's own function as one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_wrapper.losses.base import Loss, Objective, PairLogProbs, is_number

WeightedLosses = tuple[tuple[Objective, float], ...]
PairFunction = Callable[[PairLogProbs], Tensor]


@dataclass(frozen=True)
class Custom(Loss):
    """A user's own function from `PairLogProbs` to Float[p], one value per pair.

    It gets a reference unless it has an attribute `needs_reference` that is False, and margins of the data
    are refused unless it has `takes_margin`. With an attribute `pure` that is True it may be called several
    times on a batch (see `Objective.pure`), which spares memory while the head trains; `per_pair = False`
    says that it compares the pairs of a batch with one another.
    """

    function: PairFunction

    def pure(self) -> bool:
        return bool(getattr(self.function, "pure", False))

    def __post_init__(self) -> None:
        for name in ("needs_reference", "takes_margin", "per_pair"):
            object.__setattr__(self, name, bool(getattr(self.function, name, getattr(Loss, name))))

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        values = self.function(pairs)
        if not (isinstance(values, Tensor) and values.shape == pairs.chosen.shape):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            name = getattr(self.function, "__name__", repr(self.function))
            raise ValueError(
                f"a loss should give one value per pair, shape {tuple(pairs.chosen.shape)}, but {name} gave "
                f"{got}: leave the mean to DPO."
            )
        return values


def as_loss(value: object) -> Objective | None:
    """A loss as it is, a function as a `Custom` one, None for anything else."""
    if isinstance(value, Objective):
        return value
    return Custom(value) if callable(value) and not isinstance(value, type) else None


def weighted(
    loss: Objective | PairFunction | Sequence[tuple[Objective | PairFunction, float]],
) -> WeightedLosses:
    """One loss or a list of `(loss, weight)` as a checked tuple of `(loss, weight)`."""
    single = as_loss(loss)
    given: Sequence[Any] = (
        ((single, 1.0),) if single is not None else tuple(loss) if isinstance(loss, (list, tuple)) else ()
    )
    terms: list[tuple[Objective, float]] = []
    for term in given:
        each = as_loss(term[0]) if isinstance(term, (list, tuple)) and len(term) == 2 else None
        if each is None:
            raise TypeError(f"a combined loss should be a list of (loss, weight), but it holds {term!r}.")
        if not (is_number(term[1]) and term[1] > 0):
            raise ValueError(
                f"the weight of {type(each).__name__} should be positive, but it is {term[1]!r}."
            )
        terms.append((each, float(term[1])))
    if not terms:
        remedy = f": write {loss.__name__}()." if isinstance(loss, type) else "."
        raise TypeError(
            "loss should be one of dpo_wrapper.losses, a function or a list of (loss, weight), "
            f"but it is {loss!r}{remedy}"
        )
    if len({each.data for each, _ in terms}) > 1:
        raise TypeError(
            f"{names([each for each, _ in terms])} learn from different data: combine losses of one kind."
        )
    return tuple(terms)


def needs_reference(terms: WeightedLosses) -> bool:
    return any(loss.needs_reference for loss, _ in terms)


def unit_of(terms: WeightedLosses) -> str:
    """What they learn from: 'pairs', 'lists' (ranked) or 'rows' (with a label)."""
    return terms[0][0].data.unit


def names(losses: Sequence[Objective]) -> str:
    return " and ".join(type(loss).__name__ for loss in losses)


def check_columns(terms: WeightedLosses, *, margins: bool, pair_weights: bool) -> None:
    """Refuse what the data gives for each pair where it could not act: ValueError."""
    mixed = [loss for loss, _ in terms if not loss.per_pair]
    if pair_weights and mixed:
        raise ValueError(
            f"weights of pairs have no meaning for {names(mixed)}, which compares the pairs of a batch with "
            "one another: leave the weights out or take another loss."
        )
    if margins and not any(loss.takes_margin for loss, _ in terms):
        raise ValueError(
            f"margins have no meaning for {names([loss for loss, _ in terms])}, which has no logit to "
            "subtract them from: leave the margins out or take a loss such as Sigmoid."
        )


def combined(terms: WeightedLosses, data: Any) -> Float[Tensor, "_"]:
    """The weighted sum of the terms, per pair (or list, or row), times the data's own weights."""
    if isinstance(data, PairLogProbs):
        check_columns(terms, margins=data.margins is not None, pair_weights=data.weights is not None)
    total = torch.stack([weight * loss(data) for loss, weight in terms]).sum(dim=0)
    return total if data.weights is None else total * data.weights
