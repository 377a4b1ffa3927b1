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
from dpo_wrapper.log_probs import fused_backward, tiles
from dpo_wrapper.log_probs.softmax_cache import SoftmaxCache

FAST = settings(max_examples=60, derandomize=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# for hidden, weight and bias, whether they require gradients
NEEDS_GRAD = [needs_grad for needs_grad in product((True, False), repeat=3) if any(needs_grad)]
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


def random_inputs(
    t: int,
    v: int,
    d: int,
    dtype: torch.dtype = torch.float64,
    *,
    bias: bool = True,
    needs_grad: tuple[bool, bool, bool] = (True, True, True),
    scale: float = 1.0,
    seed: int = 0,
) -> Inputs:
    """Random inputs whose logits have a standard deviation of about `scale`."""
    generator = Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], size: float, requires_grad: bool) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * size
        return values.to(dtype).requires_grad_(requires_grad)

    return Inputs(
        normal((t, d), scale, needs_grad[0]),
        normal((v, d), d**-0.5, needs_grad[1]),
        normal((v,), 0.5, needs_grad[2]) if bias else None,
        torch.randint(0, v, (t,), generator=generator),
    )


def in_float64(inputs: Inputs) -> Inputs:
    """Leaves with the same numbers, after their rounding to the dtype of `inputs`."""

    def widen(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().double().requires_grad_(x.requires_grad)

    return Inputs(widen(inputs.hidden), widen(inputs.weight), widen(inputs.bias), inputs.targets)


def slow_logits(inputs: Inputs, logit_scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """The lines of the docstring, written out again."""
    logits = inputs.hidden @ inputs.weight.T
    if inputs.bias is not None:
        logits = logits + inputs.bias
    logits = logit_scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits


def slow_scores(inputs: Inputs, logit_scale: float = 1.0, softcap: float | None = None) -> Tensor:
    logits = slow_logits(inputs, logit_scale, softcap)
    return logits.log_softmax(-1)[range(len(inputs.targets)), inputs.targets]


def slow_extras(inputs: Inputs, **options: Any) -> dict[str, Tensor]:
    logits = slow_logits(in_float64(inputs), **options).detach()
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    target_logit = logits[range(len(logits)), inputs.targets]
    return {
        "entropy": -torch.where(p > 0, p * log_p, 0.0).sum(-1),
        "log_sum_p2": p.square().sum(-1).log(),
        "top1": target_logit >= logits.amax(-1),
        "greedy": log_p.amax(-1),
    }


def cotangent(t: int) -> Tensor:
    """A gradient of the log-probs with either sign and some zeros."""
    generator = Generator().manual_seed(99)
    grad = torch.randn(t, generator=generator, dtype=torch.float64)
    return grad * (torch.rand(t, generator=generator, dtype=torch.float32) < 0.8)


def weighted_sum(scores: Tensor) -> Tensor:
    """A loss whose gradient is `cotangent`."""
    return (scores * cotangent(len(scores)).to(scores)).sum()


def values_and_grads(scores: Tensor, inputs: Inputs) -> list[Tensor]:
    """The scores, then the gradient of each input that requires one."""
    grad = cotangent(len(scores)).to(scores.device, scores.dtype)
    return [scores.detach(), *torch.autograd.grad(scores, inputs.trained, grad)]


def truth(inputs: Inputs, **options: Any) -> list[Tensor]:
    """`values_and_grads` of the slow lines in float64."""
    wide = in_float64(inputs)
    return values_and_grads(slow_scores(wide, **options), wide)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Root mean square error, relative to the root mean square."""
    assert got.shape == expected.shape and got.isfinite().all()
    return float((got.detach().double() - expected).norm() / expected.norm().clamp(min=1e-30))


@contextmanager
def tile_size(tokens: int, entries: int, entry_bytes: int = 8) -> Iterator[None]:
    """Within, a tile has at most so many tokens and, at `entry_bytes` for a logit, vocabulary entries."""
    tile_bytes = dict.fromkeys(tiles.TILE_BYTES, tokens * entries * entry_bytes)
    with patch.object(tiles, "TILE_TOKENS", tokens), patch.dict(tiles.TILE_BYTES, tile_bytes):
        yield


def softmax_caching(is_enabled: bool) -> Any:
    """Within, all softmaxes are cached for backward, or none."""
    return cache_budget(2**40 if is_enabled else 0)


def cache_budget(max_bytes: int) -> Any:
    """Within, softmaxes of so many bytes are cached for backward."""
    return patch.object(SoftmaxCache, "budget", lambda tiles: max_bytes)


def chunk_size(max_tokens: int) -> Any:
    """Within, a chunk of a fused loss has at most so many tokens, or one group."""
    return patch.object(fused_backward, "max_chunk_tokens", lambda *_: max_tokens)
