"""Every loss of pairs once more, one pair at a time, as its paper writes it.

In float64, without care for overflow. It must share no code with the package under test. `p` and `r` are
summed log-probs of policy and reference, `n` numbers of scored tokens; `w` is chosen, `l` is rejected.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import e

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """One pair, as scalars; `mean_length` is the mean length of the batch's chosen sides."""

    p_w: Tensor
    p_l: Tensor
    r_w: Tensor
    r_l: Tensor
    n_w: int
    n_l: int
    mean_length: float

    @property
    def a(self) -> Tensor:
        return self.p_w - self.r_w

    @property
    def b(self) -> Tensor:
        return self.p_l - self.r_l


def sigma(x: Tensor) -> Tensor:
    return 1 / (1 + e ** (-x))


def log_sigma(x: Tensor) -> Tensor:
    return torch.log(sigma(x))


def cross_entropy(z: Tensor, wrong: float) -> Tensor:
    return -(1 - wrong) * log_sigma(z) - wrong * log_sigma(-z)


def odds(mean: Tensor) -> Tensor:
    return e**mean / (1 - e**mean)


SCORES: dict[str, Callable[..., Tensor]] = {
    "ReverseKL": lambda a: a,
    "ForwardKL": lambda a: 1 - 1 / e**a,
    "JensenShannon": lambda a: torch.log(2 * e**a / (e**a + 1)),
    "AlphaDivergence": lambda a, alpha: ((e**a) ** (alpha - 1) - 1) / (alpha - 1),
}


def exo_divergence(z: Tensor, wrong: float) -> Tensor:
    """KL divergence of the policy's choice between the two sides from the smoothed labels."""
    choice, labels = torch.stack([sigma(z), sigma(-z)]), torch.tensor([1 - wrong, wrong], dtype=z.dtype)
    return (choice * torch.log(choice / labels)).sum()


def alpha_reward(mean: Tensor, alpha: float) -> Tensor:
    return mean if alpha == 0 else (1 - (e**mean) ** -alpha) / alpha


# from a pair, its two scores s_w and s_l, and the options of the loss
PER_PAIR: dict[str, Callable[..., Tensor]] = {
    "Sigmoid": lambda x, s, beta, label_smoothing: cross_entropy(beta * (s[0] - s[1]), label_smoothing),
    "SigmoidNorm": lambda x, s, beta: -log_sigma(beta * (s[0] / x.n_w - s[1] / x.n_l)),
    "Robust": lambda x, s, beta, label_smoothing: (
        (
            -(1 - label_smoothing) * log_sigma(beta * (s[0] - s[1]))
            + label_smoothing * log_sigma(beta * (s[1] - s[0]))
        )
        / (1 - 2 * label_smoothing)
    ),
    "Hinge": lambda x, s, beta: max(1 - beta * (s[0] - s[1]), 0 * s[0]),
    "IPO": lambda x, s, beta: (s[0] / x.n_w - s[1] / x.n_l - 0.5 / beta) ** 2,
    "EXO": lambda x, s, beta, label_smoothing: exo_divergence(beta * (s[0] - s[1]), label_smoothing),
    "DiscoPOP": lambda x, s, beta, tau: (
        -(1 - sigma(beta * (s[0] - s[1]) / tau)) * log_sigma(beta * (s[0] - s[1]))
        + sigma(beta * (s[0] - s[1]) / tau) * e ** (-beta * (s[0] - s[1]))
    ),
    "DPOP": lambda x, s, beta, penalty: (
        -log_sigma(beta * (x.a - x.b - penalty * max(0 * x.a, x.r_w - x.p_w)))
    ),
    "NCA": lambda x, s, beta: (
        -log_sigma(beta * x.a) - log_sigma(-beta * x.a) / 2 - log_sigma(-beta * x.b) / 2
    ),
    "BCO": lambda x, s, beta: -log_sigma(beta * x.a) - log_sigma(-beta * x.b),
    "SPPO": lambda x, s, beta: (x.a - 0.5 / beta) ** 2 + (x.b + 0.5 / beta) ** 2,
    "APOZero": lambda x, s, beta: 1 - sigma(beta * x.a) + sigma(beta * x.b),
    "APODown": lambda x, s, beta: sigma(beta * x.a) + 1 - sigma(beta * (x.a - x.b)),
    "SFT": lambda x, s: -x.p_w / x.mean_length,
    "ReferenceFree": lambda x, s, beta, label_smoothing: cross_entropy(
        beta * (x.p_w - x.p_l), label_smoothing
    ),
    "CPO": lambda x, s, beta, label_smoothing, alpha: (
        cross_entropy(beta * (x.p_w - x.p_l), label_smoothing) - alpha * x.p_w / x.mean_length
    ),
    "SimPO": lambda x, s, beta, gamma: -log_sigma(beta * (x.p_w / x.n_w - x.p_l / x.n_l) - gamma),
    "AlphaPO": lambda x, s, beta, gamma, alpha: (
        -log_sigma(beta * (alpha_reward(x.p_w / x.n_w, alpha) - alpha_reward(x.p_l / x.n_l, alpha)) - gamma)
    ),
    "ORPO": lambda x, s, beta: (
        -x.p_w / x.mean_length - beta * log_sigma(torch.log(odds(x.p_w / x.n_w) / odds(x.p_l / x.n_l)))
    ),
}


def sort_scalars(values: list[Tensor]) -> list[Tensor]:
    return sorted(values, key=Tensor.item)


def aot(xs: list[Pair], beta: float, label_smoothing: float) -> list[Tensor]:
    policy = sort_scalars([x.p_w - x.p_l for x in xs])
    reference = sort_scalars([x.r_w - x.r_l for x in xs])
    return [cross_entropy(beta * (p - r), label_smoothing) for p, r in zip(policy, reference, strict=True)]


def aot_unpaired(xs: list[Pair], beta: float, label_smoothing: float) -> list[Tensor]:
    chosen, rejected = sort_scalars([x.a for x in xs]), sort_scalars([x.b for x in xs])
    return [cross_entropy(beta * (a - b), label_smoothing) for a, b in zip(chosen, rejected, strict=True)]


def beta_dpo(xs: list[Pair], beta: float, k: float, drop: float) -> list[Tensor]:
    """At the first step, where the running mean has been 0."""
    assert drop == 0
    differences = [x.a - x.b for x in xs]
    mean = sum(map(Tensor.item, differences)) / len(differences)
    adapted = max(beta * (1 + k * (mean - (0.9 * 0 + 0.1 * mean))), 1e-3)
    return [-log_sigma(adapted * difference) for difference in differences]


WHOLE_BATCH: dict[str, Callable[..., list[Tensor]]] = {
    "AOT": aot,
    "AOTUnpaired": aot_unpaired,
    "BetaDPO": beta_dpo,
}


def oracle_losses(name: str, options: dict, xs: list[Pair]) -> list[Tensor]:
    """The loss of each pair; `options["divergence"]` is the divergence's name with its own options."""
    options = dict(options)
    if name in WHOLE_BATCH:
        return WHOLE_BATCH[name](xs, **options)
    divergence, divergence_options = options.pop("divergence", ("ReverseKL", {}))
    score = partial(SCORES[divergence], **divergence_options)
    return [PER_PAIR[name](x, (score(x.a), score(x.b)), **options) for x in xs]
