"""The forward pass over all tiles, and the gradient that it computes under a frozen head."""

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_wrapper.cpu_matmul import add_matmul
from dpo_wrapper.log_probs.backend import ReducedTile, exp_difference
from dpo_wrapper.log_probs.softmax_cache import SoftmaxCache
from dpo_wrapper.log_probs.statistics import OnlineSoftmax
from dpo_wrapper.log_probs.tiles import Tiles


class OnlineHiddenGrad:
    """d lse / d hidden, summed over the tiles of the forward pass while their log-sum-exps are not known yet.

    Each token has a reference log-sum-exp, and each tile enters the sum with the weight e^(lse of the tile -
    reference). The reference is raised, and the sum rescaled, only where a weight would exceed e^5; after the
    first tile that is rare. At the end the sum is rescaled to the log-sum-exp of the whole vocabulary.
    """

    def __init__(self, tiles: Tiles) -> None:
        self.tiles = tiles
        self.grad = tiles.zeros(*tiles.hidden.shape)
        self.reference_lse = tiles.zeros(len(tiles.hidden)).fill_(-torch.inf)

    def update(self, token_slice: slice, vocab_slice: slice, new: ReducedTile) -> None:
        """Include a tile that was weighted by the reference."""
        grad, is_first = self.grad[token_slice], vocab_slice.start == 0
        if new.rescale is not None and not is_first:
            self.tiles.options.backend.scale_rows(grad, new.rescale)
        tile = new.tile.to(self.tiles.options.matmul_dtype)
        add_matmul(grad, tile, self.tiles.matmul_weight(vocab_slice), beta=0.0 if is_first else 1.0)

    def log_prob_grad(self, statistics: OnlineSoftmax) -> Float[Tensor, "t d"]:
        """The derivative d log-prob / d hidden, from the statistics of the whole vocabulary, in place."""
        grad = self.grad.mul_(exp_difference(self.reference_lse, statistics.lse).neg_()[:, None])
        target, v = self.tiles.targets - self.tiles.options.vocab_offset, len(self.tiles.weight)
        if v == 0:  # all entries are on other processes
            return grad
        is_held = (target >= 0) & (target < v)  # the others' targets are on another process
        target_weight = self.tiles.weight.index_select(0, target.clamp(0, v - 1)).to(grad.dtype)
        return grad.addcmul_(target_weight, statistics.target_grad.where(is_held, 0.0)[:, None])


def forward_tiles(
    tiles: Tiles, cache: SoftmaxCache, hidden_grad: OnlineHiddenGrad | None = None
) -> OnlineSoftmax:
    """Compute every tile once and return the statistics of all of them.

    Tiles are appended to `cache` as far as it has room, or added to `hidden_grad`.
    """
    options = tiles.options
    statistics = OnlineSoftmax.initial(len(tiles.targets), tiles.hidden.device, options.accumulation_dtype)
    for vocab_slice in tiles.vocab_slices:
        for token_slice in tiles.token_slices:
            shape = (token_slice.stop - token_slice.start, vocab_slice.stop - vocab_slice.start)
            is_cached, out = cache.reserve(*shape)
            new = options.backend.reduce(
                tiles.multiply(token_slice, vocab_slice, needs_own_memory=is_cached and out is None),
                statistics.select(token_slice),
                needs_moments=options.needs_extras,
                needs_tile=is_cached,
                reference_lse=None if hidden_grad is None else hidden_grad.reference_lse[token_slice],
                out=out,
            )
            if hidden_grad is not None:
                hidden_grad.update(token_slice, vocab_slice, new)
            if is_cached:
                cache.append(new, out)
            del new, out  # free this tile before the next is computed
    return statistics if options.vocab_group is None else statistics.all_reduce(options.vocab_group)
