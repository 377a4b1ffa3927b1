"""Draw tokens from logits, each sequence by a random stream of its own."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn, by the names and in the order of transformers.

    Attributes:
        temperature: the logits are divided by it.
        top_p: only the fewest tokens are drawn whose probabilities add up to it; 1 for all.
        top_k: only so many of the most probable tokens are drawn; 0 for all.
        seed: of the streams of random numbers.

    Raises:
        ValueError: a setting that cannot be.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            problem = f"temperature should be a number above 0, but it is {self.temperature}"
            raise ValueError(f"{problem}: give another, or generate greedily.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p should be above 0 and at most 1, but it is {self.top_p}: 1 takes all.")
        if self.top_k < 0:
            raise ValueError(f"top_k should be 0 or more, but it is {self.top_k}: 0 takes all.")


def derive_seed(seed: int, *numbers: int) -> int:
    """The seed of one of many random streams, told by numbers; below 2 ** 48, as JSON keeps it."""
    digest = hashlib.blake2b(repr((seed, *numbers)).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big")


def filter_logits(logits: Float[Tensor, "b v"], sampling: Sampling) -> Float[Tensor, "b v"]:
    """Logits of what is drawn from: divided by the temperature, and -inf for tokens that are left out.

    The same as transformers' `TemperatureLogitsWarper`, `TopKLogitsWarper` and `TopPLogitsWarper`, one after
    another.
    """
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if sampling.top_p < 1:
        ordered, indices = logits.sort()
        is_left_out = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        is_left_out[:, -1] = False
        logits = logits.masked_fill(is_left_out.scatter(1, indices, is_left_out), -math.inf)
    return logits


class TokenSampler:
    """Draws the next token of each sequence of a batch.

    What a sequence is given depends on its seed and its logits alone, and not on the others of its batch: it
    is what `torch.multinomial` draws for it alone after `torch.manual_seed(seed)`.

    Args:
        sampling: the distribution; its own seed is not used here.
        seeds: one for each sequence.
        device: of the logits.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], device: torch.device) -> None:
        self.sampling = sampling
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Float[Tensor, "b v"]) -> Int[Tensor, "b"]:
        probs = filter_logits(logits.float(), self.sampling).softmax(-1)
        rows = zip(probs, self.generators, strict=True)
        return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])
