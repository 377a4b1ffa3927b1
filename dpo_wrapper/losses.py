"""Preference losses: small frozen dataclasses from sequence log-probs to one loss per pair.

They know of no model, and they do not reduce.

Names, per pair (all in nats): `p_w, p_l` policy and `r_w, r_l` reference log-probs of chosen and rejected,
summed over the scored tokens; `n_w, n_l` how many tokens that is; `a = p_w - r_w`, `b = p_l - r_l`.
"""

import ast
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from inspect import isabstract
from typing import ClassVar, TypeGuard

import torch
import torch.nn.functional as F
from beartype import beartype
from jaxtyping import Float, Int, jaxtyped
from torch import Tensor


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class PairLogProbs:
    """What a loss may look at: sums in nats, float32 or wider, of the valid pairs alone.

    `ref_chosen` and `ref_rejected` are None where there is no reference. `mean_chosen_length` is the mean of
    `chosen_length` over all pairs of the optimizer step, of which these may be a part.
    """

    chosen: Float[Tensor, "p"]
    rejected: Float[Tensor, "p"]
    ref_chosen: Float[Tensor, "p"] | None
    ref_rejected: Float[Tensor, "p"] | None
    chosen_length: Int[Tensor, "p"]
    rejected_length: Int[Tensor, "p"]
    mean_chosen_length: Float[Tensor, ""]

    @property
    def chosen_logratio(self) -> Float[Tensor, "p"]:
        """`a`; `p_w` itself where there is no reference."""
        return self.chosen if self.ref_chosen is None else self.chosen - self.ref_chosen

    @property
    def rejected_logratio(self) -> Float[Tensor, "p"]:
        """`b`; `p_l` itself where there is no reference."""
        return self.rejected if self.ref_rejected is None else self.rejected - self.ref_rejected


def option(default: float, help: str) -> float:
    """A dataclass field with the sentence that documents it."""
    return field(default=default, metadata={"help": help})


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _check(condition: bool, loss: object, message: str) -> None:
    if not condition:
        raise ValueError(f"{type(loss).__name__}: {message}")


def _check_beta(loss: object, beta: object) -> None:
    _check(is_number(beta) and beta > 0, loss, f"beta should be positive, but it is {beta!r}.")


@dataclass(frozen=True)
class Loss(ABC):
    """Called with `PairLogProbs` it gives Float[p]. With `needs_reference = False` it ignores `r`."""

    needs_reference: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]: ...


@dataclass(frozen=True)
class Sigmoid(Loss):
    """DPO: `-(1 - ε) log σ(β(a - b)) - ε log σ(-β(a - b))`.

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; ε > 0 is conservative DPO (Mitchell 2023), for labels
    that are wrong with probability ε.
    """

    beta: float = option(0.1, "strength of the pull towards the reference")
    label_smoothing: float = option(0.0, "probability ε that a label is the wrong way round, in [0, 0.5)")

    def __post_init__(self) -> None:
        _check_beta(self, self.beta)
        smoothing = self.label_smoothing
        allowed = is_number(smoothing) and 0 <= smoothing < 0.5
        _check(allowed, self, f"label_smoothing should be in [0, 0.5), but it is {smoothing!r}.")

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        logits = self.beta * (pairs.chosen_logratio - pairs.rejected_logratio)
        return -(1 - self.label_smoothing) * F.logsigmoid(logits) - self.label_smoothing * F.logsigmoid(
            -logits
        )


@dataclass(frozen=True)
class SigmoidNorm(Loss):
    """DPO on log-ratios per token: `-log σ(β(a / n_w - b / n_l))`, as x-transformers' `DPO` means it."""

    beta: float = option(0.1, "strength of the pull towards the reference")

    def __post_init__(self) -> None:
        _check_beta(self, self.beta)

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        chosen = pairs.chosen_logratio / pairs.chosen_length
        rejected = pairs.rejected_logratio / pairs.rejected_length
        return -F.logsigmoid(self.beta * (chosen - rejected))


@dataclass(frozen=True)
class IPO(Loss):
    """`(a / n_w - b / n_l - 1 / (2β))²`. Azar et al. 2023 (arXiv 2310.12036), eq. 17, of means per token."""

    beta: float = option(
        0.1, "strength of the pull towards the reference; the margin aimed at is 1 / (2 beta)"
    )

    def __post_init__(self) -> None:
        _check_beta(self, self.beta)

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        chosen = pairs.chosen_logratio / pairs.chosen_length
        rejected = pairs.rejected_logratio / pairs.rejected_length
        return (chosen - rejected - 1 / (2 * self.beta)).square()


@dataclass(frozen=True)
class SimPO(Loss):
    """`-log σ(β(p_w / n_w - p_l / n_l) - γ)`, no reference. Meng et al. 2024 (arXiv 2405.14734), eq. 6."""

    needs_reference: ClassVar[bool] = False

    beta: float = option(2.0, "scale of the mean log-probs")
    gamma: float = option(0.5, "margin that chosen should keep over rejected")

    def __post_init__(self) -> None:
        _check_beta(self, self.beta)
        allowed = is_number(self.gamma) and self.gamma >= 0
        _check(allowed, self, f"gamma should not be negative, but it is {self.gamma!r}.")

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        chosen = pairs.chosen / pairs.chosen_length
        rejected = pairs.rejected / pairs.rejected_length
        return -F.logsigmoid(self.beta * (chosen - rejected) - self.gamma)


@dataclass(frozen=True)
class SFT(Loss):
    """Minus the mean log-prob of all scored chosen tokens: an anchor beside a preference loss.

    Pang et al. 2024 (arXiv 2404.19733). Per pair it is `-p_w / mean(n_w)`, so that the mean over pairs is
    the mean over tokens.
    """

    needs_reference: ClassVar[bool] = False

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, "p"]:
        return -pairs.chosen / pairs.mean_chosen_length


WeightedLosses = tuple[tuple[Loss, float], ...]


def weighted(loss: Loss | Sequence[tuple[Loss, float]]) -> WeightedLosses:
    """One loss or a list of `(loss, weight)` as a checked tuple of `(loss, weight)`."""
    terms = (
        ((loss, 1.0),) if isinstance(loss, Loss) else tuple(loss) if isinstance(loss, (list, tuple)) else ()
    )
    for term in terms:
        if not (isinstance(term, (list, tuple)) and len(term) == 2 and isinstance(term[0], Loss)):
            raise TypeError(f"a combined loss should be a list of (loss, weight), but it holds {term!r}.")
        if not (is_number(term[1]) and term[1] > 0):
            raise ValueError(
                f"the weight of {type(term[0]).__name__} should be positive, but it is {term[1]!r}."
            )
    if not terms:
        remedy = f": write {loss.__name__}()." if isinstance(loss, type) else "."
        raise TypeError(
            "loss should be one of dpo_wrapper.losses or a list of (loss, weight), "
            f"but it is {loss!r}{remedy}"
        )
    return tuple((term[0], float(term[1])) for term in terms)


def needs_reference(terms: WeightedLosses) -> bool:
    return any(loss.needs_reference for loss, _ in terms)


def combined(terms: WeightedLosses, pairs: PairLogProbs) -> Float[Tensor, "p"]:
    """The weighted sum of the terms, per pair."""
    total = torch.zeros_like(pairs.chosen)
    for loss, weight in terms:
        total = total + weight * loss(pairs)
    return total


def losses_by_name() -> dict[str, type[Loss]]:
    """Every loss under its lower-case name, for the command line."""
    return {cls.__name__.lower(): cls for cls in Loss.__subclasses__() if not isabstract(cls)}


def parse_losses(text: str) -> WeightedLosses:
    """Read `"sigmoid(beta=0.1) + 0.5*sft"` as a list of weighted losses.

    A term is a loss's name, its options in brackets if they are not to be the default, and a factor in front
    if its weight is not to be 1. Raises ValueError with what may stand there.
    """

    def terms(node: ast.expr) -> list[tuple[Loss, float]]:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return terms(node.left) + terms(node.right)
        weight = 1.0
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            weight, node = number(node.left), node.right
        call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
        name = call.func.id.lower() if isinstance(call.func, ast.Name) else ast.unparse(call.func)
        if name not in known:
            raise ValueError(f"unknown loss {name!r} in {text!r}: there are {', '.join(known)}.")
        options = [f.name for f in fields(known[name])]
        given = {str(keyword.arg): keyword.value for keyword in call.keywords}
        if call.args or len(given) < len(call.keywords) or not set(given) <= set(options):
            raise ValueError(
                f"{name} in {text!r} takes {', '.join(options) or 'no options'}, as name=number."
            )
        return [(known[name](**{key: number(value) for key, value in given.items()}), weight)]

    def number(node: ast.expr) -> float:
        try:
            value = ast.literal_eval(node)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError
            return float(value)
        except (ValueError, TypeError, OverflowError):
            raise ValueError(f"expected a number in {text!r}, got {ast.unparse(node)!r}.") from None

    known = losses_by_name()
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError:
        raise ValueError(
            f"cannot read the loss {text!r}: write it like 'sigmoid(beta=0.1) + 0.5*sft'."
        ) from None
    return weighted(terms(tree.body))


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    beta: float = 0.1,
    *,
    ref_chosen_logprobs: Tensor | None = None,
    ref_rejected_logprobs: Tensor | None = None,
) -> Float[Tensor, ""]:
    """The DPO loss as one function: `-log σ(β((p_w - r_w) - (p_l - r_l)))`, mean over the batch.

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7. Without reference log-probs `r = 0`: the simplified form
    `-log σ(β(p_w - p_l))`.

    Args:
        chosen_logprobs, rejected_logprobs: nats; Float[b] sums, or Float[b n] per token (0 where not
            scored), which are summed over n.
        ref_chosen_logprobs, ref_rejected_logprobs: the reference's, of the same shape; both or neither.

    Raises:
        ValueError: unequal shapes, other than one or two dimensions, only one reference, or `beta <= 0`.
    """
    if (ref_chosen_logprobs is None) != (ref_rejected_logprobs is None):
        raise ValueError("give both ref_chosen_logprobs and ref_rejected_logprobs, or neither.")
    sides = [chosen_logprobs, rejected_logprobs]
    if ref_chosen_logprobs is not None and ref_rejected_logprobs is not None:
        sides += [ref_chosen_logprobs.detach(), ref_rejected_logprobs.detach()]
    shapes = [tuple(side.shape) for side in sides]
    if len(set(shapes)) > 1 or len(shapes[0]) not in (1, 2):
        raise ValueError(f"log-probs should all have one shape, (b,) or (b, n), but the shapes are {shapes}.")
    if shapes[0][0] == 0:
        raise ValueError(f"log-probs should hold at least one pair, but their shape is {shapes[0]}.")
    sums = [side.to(torch.promote_types(side.dtype, torch.float32)) for side in sides]
    sums = [side.sum(dim=-1) if side.ndim == 2 else side for side in sums]
    lengths = torch.ones_like(sums[0], dtype=torch.long)
    chosen, rejected, *references = sums
    ref_chosen, ref_rejected = references or (None, None)
    one = chosen.new_ones(())
    pairs = PairLogProbs(chosen, rejected, ref_chosen, ref_rejected, lengths, lengths, one)
    return Sigmoid(beta)(pairs).mean()
