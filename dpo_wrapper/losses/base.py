"""The base classes of losses, the fields that hold their options, and numerics that losses share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_wrapper.losses.inputs import PairLogProbs, log_ratio


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def number_field(
    default: float,
    help: str,
    requirement: str = "be a number",
    is_valid: Callable[[Any], bool] = lambda value: True,
) -> float:
    """A dataclass field that holds a number.

    Args:
        default: its default value.
        help: the sentence that documents it.
        requirement: what the value should do, for the error message, such as "be positive".
        is_valid: whether a finite number meets the requirement.
    """
    metadata = {
        "help": help,
        "requirement": requirement,
        "is_valid": lambda value: is_number(value) and is_valid(value),
    }
    return field(default=default, metadata=metadata)


def positive_field(default: float, help: str) -> float:
    """A dataclass field that holds a positive number."""
    return number_field(default, help, "be positive", lambda value: value > 0)


def nonnegative_field(default: float, help: str) -> float:
    """A dataclass field that holds a number of 0 or more."""
    return number_field(default, help, "not be negative", lambda value: value >= 0)


def label_smoothing_field(default: float = 0.0) -> float:
    """The dataclass field of ε, in [0, 0.5)."""
    help = "probability ε that a label is the wrong way round, in [0, 0.5)"
    return number_field(default, help, "be in [0, 0.5)", lambda value: 0 <= value < 0.5)


def beta_field() -> float:
    """The dataclass field of β."""
    return positive_field(0.1, "strength of the pull towards the reference")


@dataclass(frozen=True)
class ValidatedDataclass:
    """A frozen dataclass that checks its options when it is made."""

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if "is_valid" in option.metadata and not option.metadata["is_valid"](value):
                raise ValueError(
                    f"{type(self).__name__}: {option.name} should {option.metadata['requirement']}, "
                    f"but it is {value!r}."
                )


@dataclass(frozen=True)
class Loss(ValidatedDataclass, ABC):
    """A preference loss: from log-probs to one value for each pair, list or row, in their dtype.

    A subclass is a frozen dataclass. Each of its options is a `number_field`. Its docstring begins with the
    formula in backquotes and has a paragraph `Paper: ...` and one `For: ...`: the command line and the
    documentation find the class and its description by themselves.
    """

    log_probs_type: ClassVar[Any] = PairLogProbs
    """What it is called with: PairLogProbs, RankedLogProbs or UnpairedLogProbs."""
    needs_reference: ClassVar[bool] = True
    """Whether it reads the reference's log-probs."""
    has_margin: ClassVar[bool] = False
    """Whether it subtracts the data's margins inside its sigmoid or hinge."""
    is_per_pair: ClassVar[bool] = True
    """Whether each value depends on its own pair alone, and not on the other pairs of the batch."""
    has_rewards: ClassVar[bool] = True
    """Whether it compares completions, by rewards that the metrics report."""
    is_per_token: ClassVar[bool] = False
    """Whether its rewards are those of a mean token, so that a longer completion has no larger one."""
    is_deterministic: ClassVar[bool] = True
    """Whether the same log-probs always give the same values.

    Only then may `DPO` call it ahead of time, also with log-probs of -1 per token in place of those that are
    not computed yet.
    """

    @abstractmethod
    def __call__(self, log_probs: Any) -> Tensor:
        """One value for each pair, list or row."""

    def reward(self, policy: Tensor, reference: Tensor | None, length: Tensor) -> Tensor:
        """What the loss compares completions by, in nats, as the metrics report it: by default β(p - r).

        Args:
            policy, reference: Float[*c], log-probs of completions, sums over tokens; no reference is 0.
            length: Int[*c], numbers of scored tokens.

        Returns:
            Float[*c], which grows with the policy's log-prob.
        """
        return getattr(self, "beta", 1.0) * log_ratio(policy, reference)

    def observe(self, log_probs: Any) -> None:
        """Called once with the log-probs of each forward pass of training, for losses with a state."""

    def discard_step(self) -> None:
        """Called in place of `end_step` where a step has left the weights alone: forget what it observed."""

    def end_step(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Called after the last forward pass of each optimizer step; `reduce` sums over processes."""


@dataclass(frozen=True)
class PairLoss(Loss):
    """A loss of preference pairs: from `PairLogProbs` to Float[p], one value per pair."""

    @abstractmethod
    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]: ...

    def rewards(self, pairs: PairLogProbs) -> tuple[Float[Tensor, "p"], Float[Tensor, "p"]]:
        """The rewards of chosen and of rejected."""
        chosen = self.reward(pairs.chosen, pairs.ref_chosen, pairs.chosen_length)
        return chosen, self.reward(pairs.rejected, pairs.ref_rejected, pairs.rejected_length)


def clamp_exponent(x: Tensor) -> Tensor:
    """x, at most as large that `e^x` can still be squared: about 40 in float32."""
    return x.clamp(max=math.log(torch.finfo(x.dtype).max) / 2 - 4)


def log1mexp(x: Tensor) -> Tensor:
    """`log(1 - e^x)` for x < 0, accurate at both ends; an x closer to 0 than rounding is set to rounding.

    Mächler 2012: `log(-expm1(x))` above -ln 2, `log1p(-exp(x))` below.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    is_near_zero = x > -math.log(2)
    filler = -torch.ones_like(x)  # keeps the gradient of the branch that is not taken finite
    near_zero = torch.log(-torch.expm1(x.where(is_near_zero, filler)))
    return near_zero.where(is_near_zero, torch.log1p(-torch.exp(x.where(~is_near_zero, filler))))
