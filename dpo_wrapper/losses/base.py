"""What every loss is made of: the log-probs that it looks at, and its options with their checks."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeGuard

import torch
from beartype import beartype
from jaxtyping import Float, Int, jaxtyped
from torch import Tensor


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class RunningGap:
    """Exponential means over the steps so far: of the mean of `a - b` and of its standard deviation."""

    mean: Float[Tensor, ""]
    spread: Float[Tensor, ""]


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class PromptedLogProbs:
    """Log-probs of prompt and chosen together, and the mean over the step of how many tokens that is."""

    chosen: Float[Tensor, "p"]
    mean_length: Float[Tensor, ""]

    @property
    def nll(self) -> Float[Tensor, "p"]:
        return -self.chosen / self.mean_length


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class PairLogProbs:
    """What a loss may look at: sums in nats of the valid pairs alone; half precision is widened to float32.

    `ref_chosen` and `ref_rejected` are None where there is no reference. `mean_chosen_length` is the mean of
    `chosen_length` over all pairs of the optimizer step, of which these may be a part. `margins` and
    `pair_weights` come from the data, `gap` from the steps before, for a loss with `needs_gap`.
    `whole_chosen` is `p_w` over all scored tokens where `chosen` is not (LD-DPO); lengths are those of all.
    `prompted` is there for a loss with `needs_prompt()`.
    """

    unit: ClassVar[str] = "pairs"
    """What there is one loss for, in words."""

    chosen: Float[Tensor, "p"]
    rejected: Float[Tensor, "p"]
    ref_chosen: Float[Tensor, "p"] | None
    ref_rejected: Float[Tensor, "p"] | None
    chosen_length: Int[Tensor, "p"]
    rejected_length: Int[Tensor, "p"]
    mean_chosen_length: Float[Tensor, ""]
    margins: Float[Tensor, "p"] | None = None
    pair_weights: Float[Tensor, "p"] | None = None
    gap: RunningGap | None = None
    whole_chosen: Float[Tensor, "p"] | None = None
    prompted: PromptedLogProbs | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
                object.__setattr__(self, name, value.float())

    @property
    def weights(self) -> Float[Tensor, "p"] | None:
        return self.pair_weights

    @property
    def chosen_logratio(self) -> Float[Tensor, "p"]:
        """`a`; `p_w` itself where there is no reference."""
        return self.chosen if self.ref_chosen is None else self.chosen - self.ref_chosen

    @property
    def rejected_logratio(self) -> Float[Tensor, "p"]:
        """`b`; `p_l` itself where there is no reference."""
        return self.rejected if self.ref_rejected is None else self.rejected - self.ref_rejected

    @property
    def chosen_mean(self) -> Float[Tensor, "p"]:
        """`p_w / n_w`"""
        return self.chosen / self.chosen_length

    @property
    def rejected_mean(self) -> Float[Tensor, "p"]:
        """`p_l / n_l`"""
        return self.rejected / self.rejected_length

    @property
    def chosen_nll(self) -> Float[Tensor, "p"]:
        """`-p_w / mean(n_w)`: its mean over the pairs is minus the mean log-prob of all chosen tokens."""
        whole = self.chosen if self.whole_chosen is None else self.whole_chosen
        return -whole / self.mean_chosen_length

    def less_margin(self, logits: Float[Tensor, "p"]) -> Float[Tensor, "p"]:
        """`logits - margins`, where the data has any."""
        return logits if self.margins is None else logits - self.margins


# options

Fits = Callable[[Any], bool]
"""Whether a number may be the value of an option."""


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def option(default: float, help: str, wanted: str = "be a number", fits: Fits = lambda value: True) -> float:
    """A number as a field of a dataclass, with the sentence that documents it and what it has to fulfil."""

    def check(value: object) -> bool:
        return is_number(value) and fits(value)

    return field(default=default, metadata={"help": help, "wanted": wanted, "fits": check})


def positive(default: float, help: str) -> float:
    return option(default, help, "be positive", lambda value: value > 0)


def not_negative(default: float, help: str) -> float:
    return option(default, help, "not be negative", lambda value: value >= 0)


def smoothing(default: float = 0.0) -> float:
    help = "probability ε that a label is the wrong way round, in [0, 0.5)"
    return option(default, help, "be in [0, 0.5)", lambda value: 0 <= value < 0.5)


def flag(help: str) -> bool:
    """A switch that is off unless it is turned on."""
    metadata = {"help": help, "wanted": "be True or False", "fits": is_flag, "kind": bool}
    return field(default=False, metadata=metadata)


def is_flag(value: object) -> bool:
    return isinstance(value, bool)


def pull(default: float = 0.1) -> float:
    return positive(default, "strength of the pull towards the reference")


@dataclass(frozen=True)
class Configured:
    """A frozen dataclass whose options are checked when it is made."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if "fits" in each.metadata and not each.metadata["fits"](value):
                wanted = each.metadata["wanted"]
                raise ValueError(f"{type(self).__name__}: {each.name} should {wanted}, but it is {value!r}.")


@dataclass(frozen=True)
class Objective(Configured, ABC):
    """Called with its kind of `data` it gives one loss for each pair, list or row, in their dtype.

    A subclass is a frozen dataclass, with an `option` for each field, and a docstring that has the formula in
    backquotes first and then a paragraph `Paper: ...` and one `For: ...`. That is all: the command line and
    the README's table find it by itself.
    """

    data: ClassVar[Any] = PairLogProbs
    """What it is called with."""
    needs_reference: ClassVar[bool] = True
    """Whether it looks at the reference's log-probs."""
    takes_margin: ClassVar[bool] = False
    """Whether it subtracts `margins` inside its sigmoid or hinge."""
    per_pair: ClassVar[bool] = True
    """Whether each value belongs to its pair alone, and would be the same among other pairs."""
    needs_gap: ClassVar[bool] = False
    """Whether it looks at `gap`, the running mean and spread of `a - b`."""

    def needs_prompt(self) -> bool:
        """Whether it looks at `prompted`."""
        return False

    def pure(self) -> bool:
        """Whether it gives the same each time, so that it may be called beforehand, with scores that are -1
        per token where they are not known yet."""
        return True

    @abstractmethod
    def __call__(self, data: Any) -> Tensor: ...


@dataclass(frozen=True)
class Loss(Objective):
    """A loss of pairs: called with `PairLogProbs` it gives Float[p], one loss per pair."""

    @abstractmethod
    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]: ...


# numerics


def largest_exponent(dtype: torch.dtype) -> float:
    """An exponent whose exponential can still be squared: about 40 in float32."""
    return math.log(torch.finfo(dtype).max) / 2 - 4


def finite_exp(x: Tensor) -> Tensor:
    """`e^x`, constant above the largest exponent that can be computed with."""
    return x.clamp(max=largest_exponent(x.dtype)).exp()


def finite_expm1(x: Tensor) -> Tensor:
    """`e^x - 1`, constant above the largest exponent that can be computed with."""
    return x.clamp(max=largest_exponent(x.dtype)).expm1()


def log1mexp(x: Tensor) -> Tensor:
    """`log(1 - e^x)` for x < 0, exact on both ends; what is nearer to 0 than rounding counts as rounding.

    Mächler 2012: `log(-expm1(x))` above -ln 2, `log1p(-exp(x))` below.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -math.log(2)
    close = torch.log(-torch.expm1(x.where(near, -torch.ones_like(x))))
    return close.where(near, torch.log1p(-torch.exp(x.where(~near, -torch.ones_like(x)))))
