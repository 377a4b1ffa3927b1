"""The gradient for hidden states under a frozen head, summed while the tiles go by."""

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_wrapper.cpu_matmul import add_matmul
from dpo_wrapper.log_probs.statistics import Folded
from dpo_wrapper.log_probs.tiles import Tiles

REACH = 5.0
"""A tile's weight may be e^5 times that of the anchor, which float16 can still hold."""


class Weighed:
    """The gradient of log-sum-exps for hidden states, summed over tiles by their weights against an anchor.

    The anchor is a log-sum-exp of each token; it moves, and what has been summed is weighed anew, only where
    a tile is far above it, which is seldom after the first.
    """

    def __init__(self, tiles: Tiles) -> None:
        self.tiles = tiles
        self.sum = tiles.new(*tiles.hidden.shape)
        self.anchor = tiles.new(len(tiles.hidden)).fill_(-torch.inf)

    def add(self, rows: slice, words: slice, folded: Folded) -> None:
        """Takes the tile in, and uses it up."""
        anchor, dtype = self.anchor[rows], self.tiles.options.dtype
        above = folded.lse > anchor + REACH
        if anchor.device.type != "cpu" or above.any():  # on an accelerator asking takes longer than doing
            moved = folded.lse.where(above, anchor)
            self.sum[rows].mul_(ratio(anchor, moved)[:, None])
            anchor.copy_(moved)
        block = folded.block.mul_(ratio(folded.lse, anchor).to(folded.block.dtype)[:, None])
        add_matmul(self.sum[rows], block.to(dtype), self.tiles.weight[words].to(dtype))

    def against(self, total: Float[Tensor, "t"]) -> Float[Tensor, "t d"]:
        """The sum, weighed against the whole."""
        return self.sum.mul_(ratio(self.anchor, total)[:, None])


def ratio(lse: Tensor, other: Tensor) -> Tensor:
    """`e^(lse - other)`, 0 for nothing over nothing."""
    return (lse - other).exp().masked_fill(lse == -torch.inf, 0.0)
