"""The forward pass over all tiles, and the gradient that it computes under a frozen head."""

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_wrapper.cpu_matmul import add_matmul
from dpo_wrapper.log_probs.softmax_cache import SoftmaxCache
from dpo_wrapper.log_probs.statistics import OnlineSoftmax, TileSoftmax
from dpo_wrapper.log_probs.tiles import Tiles

MAX_LOG_WEIGHT = 5.0
"""Weights of tiles are at most e^5, which leaves float16 room for a tile times its weight."""


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

    def update(self, token_slice: slice, vocab_slice: slice, new: TileSoftmax) -> None:
        """Include a tile, whose softmax is overwritten."""
        reference, dtype = self.reference_lse[token_slice], self.tiles.options.matmul_dtype
        is_above = new.non_target_lse > reference + MAX_LOG_WEIGHT
        # an accelerator would have to wait for the answer
        if reference.device.type != "cpu" or is_above.any():
            raised = new.non_target_lse.where(is_above, reference)
            self.grad[token_slice].mul_(exp_difference(reference, raised)[:, None])
            reference.copy_(raised)
        tile_weight = exp_difference(new.non_target_lse, reference).to(new.tile.dtype)
        tile = new.tile.mul_(tile_weight[:, None])
        add_matmul(self.grad[token_slice], tile.to(dtype), self.tiles.weight[vocab_slice].to(dtype))

    def log_prob_grad(self, statistics: OnlineSoftmax) -> Float[Tensor, "t d"]:
        """The derivative d log-prob / d hidden, from the statistics of the whole vocabulary, in place."""
        grad = self.grad.mul_(exp_difference(self.reference_lse, statistics.lse)[:, None]).neg_()
        column = self.tiles.target_column(slice(None), slice(0, len(self.tiles.weight)))
        tokens = (column >= 0).nonzero()[:, 0]  # the others' targets are on another process
        target_weight = self.tiles.weight[column[tokens]].to(grad.dtype)
        grad[tokens] += target_weight * statistics.target_grad[tokens, None]
        return grad


def exp_difference(lse: Tensor, reference_lse: Tensor) -> Tensor:
    """`e^(lse - reference_lse)`, and 0 where both are -inf."""
    return (lse - reference_lse).exp().masked_fill(lse == -torch.inf, 0.0)


def forward_tiles(
    tiles: Tiles, cache: SoftmaxCache, hidden_grad: OnlineHiddenGrad | None = None
) -> OnlineSoftmax:
    """Compute every tile once and return the statistics of all of them.

    Softmaxes are appended to `cache` as far as it has room, or added to `hidden_grad`.
    """
    statistics = OnlineSoftmax.initial(tiles.zeros(len(tiles.targets)))
    for vocab_slice in tiles.vocab_slices:
        for token_slice in tiles.token_slices:
            shape = (token_slice.stop - token_slice.start, vocab_slice.stop - vocab_slice.start)
            is_cached, out = cache.reserve(*shape)
            new = tiles.softmax(
                token_slice,
                vocab_slice,
                out=out,
                needs_own_memory=is_cached and out is None,
                needs_softmax=is_cached or hidden_grad is not None,
                needs_moments=tiles.options.needs_extras,
            )
            statistics.update(token_slice, new)
            if hidden_grad is not None:
                hidden_grad.update(token_slice, vocab_slice, new)
            if is_cached:
                cache.append(new.tile, new.non_target_lse, out)
            del new, out  # free this tile before the next is computed
    group = tiles.options.vocab_group
    return statistics if group is None else statistics.all_reduce(group)
