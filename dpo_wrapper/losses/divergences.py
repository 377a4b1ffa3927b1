"""f-divergences: scores of log-ratios, where another divergence than KL holds policy and reference together.

f-DPO, Wang 2023 (arXiv 2309.16240): `βΔ = β(s(a) - s(b))` with the score `s = f'(e^a)`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dpo_wrapper.losses.base import ValidatedDataclass, clamp_exponent, number_field


@dataclass(frozen=True)
class Divergence(ValidatedDataclass, ABC):
    """An f-divergence: from log-ratios in nats to their scores `s = f'(e^a)`, in the same shape."""

    @abstractmethod
    def __call__(self, logratio: Float[Tensor, "p"]) -> Float[Tensor, "p"]: ...


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """`s(a) = a`: the divergence of DPO."""

    def __call__(self, logratio: Float[Tensor, "p"]) -> Float[Tensor, "p"]:
        return logratio


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """`s(a) = 1 - e^(-a)`, constant where the exponential would overflow."""

    def __call__(self, logratio: Float[Tensor, "p"]) -> Float[Tensor, "p"]:
        return 1 - clamp_exponent(-logratio).exp()


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """`s(a) = log 2 + log σ(a)`."""

    def __call__(self, logratio: Float[Tensor, "p"]) -> Float[Tensor, "p"]:
        return math.log(2) + F.logsigmoid(logratio)


@dataclass(frozen=True)
class AlphaDivergence(Divergence):
    """`s(a) = (e^((α - 1) a) - 1) / (α - 1)`, constant where the exponential would overflow.

    α = 1 is its limit, reverse KL; α = 0 is forward KL.
    """

    alpha: float = number_field(0.5, "α of the divergence")

    def __call__(self, logratio: Float[Tensor, "p"]) -> Float[Tensor, "p"]:
        power = self.alpha - 1
        return logratio if power == 0 else clamp_exponent(power * logratio).expm1() / power


def divergence_field() -> Any:
    """The dataclass field of a loss that is computed from scores."""
    return field(
        default=ReverseKL(),
        metadata={
            "help": "f-divergence that holds policy and reference together",
            "requirement": "be a divergence, such as ForwardKL()",
            "is_valid": lambda value: isinstance(value, Divergence),
            "type": Divergence,
        },
    )
