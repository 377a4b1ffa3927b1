"""Inputs for `token_log_probs`, the slow lines of its docstring in float64, and small tiles."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from hypothesis import settings
from torch import Generator, Tensor

from dpo_wrapper import token_log_probs
from dpo_wrapper.log_probs import tiles as tiling
from dpo_wrapper.log_probs import torch_tile as chunked

FAST = settings(max_examples=60, deadline=None, derandomize=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# in the order of `Inputs`: everything trains, the head is frozen, and so on
WANTED = [wanted for wanted in product((True, False), repeat=3) if any(wanted)]
OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 2.5},
    "scale-softcap": {"logit_scale": -1.7, "softcap": 1.5},
}


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor

    def scores(self, **options: Any) -> Any:
        return token_log_probs(self.hidden, self.weight, self.targets, bias=self.bias, **options)

    @property
    def trained(self) -> list[Tensor]:
        return [x for x in self[:3] if x is not None and x.requires_grad]

    def to(self, device: str) -> "Inputs":
        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach().to(device).requires_grad_(x.requires_grad)

        return Inputs(*map(move, self))


def inputs(
    t: int,
    v: int,
    d: int,
    dtype: torch.dtype = torch.float64,
    *,
    bias: bool = True,
    wanted: tuple[bool, bool, bool] = (True, True, True),
    scale: float = 1.0,
    seed: int = 0,
) -> Inputs:
    """Random inputs whose logits have a standard deviation of about `scale`."""
    generator = Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], size: float, requires_grad: bool) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * size
        return values.to(dtype).requires_grad_(requires_grad)

    return Inputs(
        normal((t, d), scale, wanted[0]),
        normal((v, d), d**-0.5, wanted[1]),
        normal((v,), 0.5, wanted[2]) if bias else None,
        torch.randint(0, v, (t,), generator=generator),
    )


def in_float64(given: Inputs) -> Inputs:
    """The same numbers, rounding included, as leaves of their own."""

    def widen(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().double().requires_grad_(x.requires_grad)

    return Inputs(widen(given.hidden), widen(given.weight), widen(given.bias), given.targets)


def slow_logits(given: Inputs, logit_scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """The lines of the docstring, written out again."""
    logits = given.hidden @ given.weight.T
    if given.bias is not None:
        logits = logits + given.bias
    logits = logit_scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits


def slow_scores(given: Inputs, logit_scale: float = 1.0, softcap: float | None = None) -> Tensor:
    logits = slow_logits(given, logit_scale, softcap)
    return logits.log_softmax(-1)[range(len(given.targets)), given.targets]


def slow_extras(given: Inputs, **options: Any) -> dict[str, Tensor]:
    logits = slow_logits(in_float64(given), **options).detach()
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    own = logits[range(len(logits)), given.targets]
    return {
        "entropy": -torch.where(p > 0, p * log_p, 0.0).sum(-1),
        "log_sum_p2": p.square().sum(-1).log(),
        "top1": own >= logits.amax(-1),
        "greedy": log_p.amax(-1),
    }


def cotangent(t: int) -> Tensor:
    """What comes back from a loss: of either sign, some of it zero."""
    generator = Generator().manual_seed(99)
    grad = torch.randn(t, generator=generator, dtype=torch.float64)
    return grad * (torch.rand(t, generator=generator) < 0.8)


def weighted(scores: Tensor) -> Tensor:
    """A loss with that gradient."""
    return (scores * cotangent(len(scores)).to(scores)).sum()


def with_grads(scores: Tensor, given: Inputs) -> list[Tensor]:
    """Scores, then the gradient of each input that wants one."""
    grad = cotangent(len(scores)).to(scores.device, scores.dtype)
    return [scores.detach(), *torch.autograd.grad(scores, given.trained, grad)]


def truth(given: Inputs, **options: Any) -> list[Tensor]:
    wide = in_float64(given)
    return with_grads(slow_scores(wide, **options), wide)


def error(got: Tensor, expected: Tensor) -> float:
    """Root mean square error, relative to the root mean square."""
    assert got.shape == expected.shape and got.isfinite().all()
    return float((got.detach().double() - expected).norm() / expected.norm().clamp(min=1e-30))


@contextmanager
def tiles(rows: int, words: int, per_value: int = 8) -> Iterator[None]:
    """Inside, a tile holds `rows` tokens and, at so many bytes a logit, `words` words."""
    room = dict.fromkeys(chunked.TILE_BYTES, rows * words * per_value)
    with patch.object(tiling, "ROWS", rows), patch.dict(chunked.TILE_BYTES, room):
        yield


def keeps(softmaxes: bool) -> Any:
    """Inside, softmaxes are kept for backward, or computed again."""
    return keeps_bytes(2**40 if softmaxes else 0)


def keeps_bytes(room: int) -> Any:
    """Inside, softmaxes of so many bytes are kept for backward."""
    return patch.object(chunked, "keep_bytes", lambda weight: room)


def parts_of(rows: int) -> Any:
    """Inside, gradients that are made ahead are made of so many tokens at once, or of one group."""
    return patch.object(chunked, "part_rows", lambda weight: rows)
