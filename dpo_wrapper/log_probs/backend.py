"""What is done with a tile of raw products between the matrix products: the interface of the backends."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpo_wrapper.log_probs.statistics import OnlineSoftmax

MAX_LOG_WEIGHT = 5.0
"""Weights of tiles are at most e^5, which leaves float16 room for a tile times its weight."""


class RawTile(NamedTuple):
    """A tile of raw products `hidden @ weight.T`, r tokens by w vocabulary entries, and how to make logits.

    A *slope* is the derivative of a logit by its raw product: `logit_scale`, times the derivative of the
    softcap where there is one.
    """

    product: Float[Tensor, "r w"]
    targets: Int[Tensor, "r"]
    vocab_start: int
    """The id of the tile's first vocabulary entry; targets count from 0."""
    bias: Float[Tensor, "w"] | None
    logit_scale: float
    softcap: float | None

    def locate_targets(self) -> tuple[Tensor, Tensor]:
        """For each token whether the tile holds its target, and in which column; 0 where it does not."""
        column = self.targets - self.vocab_start
        is_held = (column >= 0) & (column < self.product.shape[1])
        return is_held, column.where(is_held, 0)


class ReducedTile(NamedTuple):
    """A tile after `TileBackend.reduce`: what of it enters further products."""

    tile: Float[Tensor, "r w"]
    lse: Float[Tensor, "r"] | None = None
    """Log-sum-exp over the tile's entries without the target, where `tile` is the softmax over them."""
    rescale: Float[Tensor, "r"] | None = None
    """Factor of what was summed before, where the reference log-sum-exp was raised."""


class TileBackend(ABC):
    """Reduces tiles to statistics, and turns them into gradients, in float32 or wider."""

    max_width: int | None = None
    """The most vocabulary entries in a tile."""

    @abstractmethod
    def entry_bytes(self, matmul_dtype: torch.dtype) -> int:
        """The memory that each entry of a tile takes while the tile is computed."""

    @abstractmethod
    def reduce(
        self,
        raw: RawTile,
        statistics: OnlineSoftmax,
        *,
        needs_moments: bool = False,
        needs_tile: bool = False,
        reference_lse: Float[Tensor, "r"] | None = None,
        out: Float[Tensor, "r w"] | None = None,
    ) -> ReducedTile:
        """Include a tile in the statistics of its tokens, in place. The product may be overwritten.

        With `needs_tile` the result is for `write_grad`, written to `out` if that is given. With
        `reference_lse` it is e^(logit - reference_lse) times the slope, 0 at targets. The reference is raised
        in place where the tile's log-sum-exp exceeds it by more than `MAX_LOG_WEIGHT`.
        """

    @abstractmethod
    def write_grad(
        self,
        raw: RawTile,
        tile_lse: Float[Tensor, "r"] | None,
        lse: Float[Tensor, "r"],
        target_grad: Float[Tensor, "r"],
    ) -> Float[Tensor, "r w"]:
        """Minus d log-prob / d raw product, in place of the product where dtypes allow.

        `lse` is over the whole vocabulary, and the value at a target is minus `target_grad`. With `tile_lse`,
        `raw.product` is what `reduce` returned with `needs_tile`, and `tile_lse` its `lse`.
        """

    def scale_rows(self, values: Float[Tensor, "r d"], factor: Float[Tensor, "r"]) -> None:
        """Multiply each row by its factor, in place."""
        values.mul_(factor[:, None])


def exp_difference(lse: Tensor, reference_lse: Tensor) -> Tensor:
    """`e^(lse - reference_lse)`, and 0 where both are -inf."""
    return (lse - reference_lse).exp().masked_fill(lse == -torch.inf, 0.0)
