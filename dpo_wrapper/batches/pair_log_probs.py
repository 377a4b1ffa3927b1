"""What pairs need of single tokens: the discounted sums of LD-DPO and the weights of WPO."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpo_wrapper.batches.sequences import ScoredSequences, SequenceLogProbs


def discounted_sums(
    sequences: ScoredSequences, pair_index: Int[Tensor, "p 2"], tokens: Float[Tensor, "t"], alpha: float
) -> tuple[Float[Tensor, "p"], Float[Tensor, "p"]]:
    """The sums of chosen and of rejected, in which tokens beyond the shorter completion count by `alpha`.

    A side's sum is its first `min(n_w, n_l)` log-probs plus `alpha` times the others: LD-DPO, Liu 2024 (arXiv
    2409.06411). `alpha = 1` gives the plain sums.
    """
    width = max(1, int(sequences.on_cpu.length.max())) if len(sequences.length) else 1
    first = sequences.length.cumsum(dim=0) - sequences.length
    place = torch.arange(len(tokens), device=tokens.device) - first[sequences.row]  # within the completion
    table = tokens.new_zeros(len(sequences.length), width).index_put((sequences.row, place), tokens)
    shorter = sequences.length[pair_index].amin(dim=-1, keepdim=True)
    is_shared = torch.arange(width, device=tokens.device) < shorter
    weights = torch.where(is_shared, 1.0, alpha).to(tokens.dtype)
    chosen, rejected = ((table[side] * weights).sum(dim=-1) for side in pair_index.unbind(dim=-1))
    return chosen, rejected


@torch.no_grad()
def wpo_weights(
    sequences: ScoredSequences, pair_index: Int[Tensor, "p 2"], policy: SequenceLogProbs
) -> Float[Tensor, "p"]:
    """A weight for each pair, the larger the likelier the policy itself is to write it.

    WPO, Zhou 2024 (arXiv 2406.11827): the product over both sides of `exp(mean_t[log p_t - log Σ_v p_v²])`,
    without a gradient. A side without a scored token counts 1; such a pair is not valid anyhow.
    The policy's log-probs need `tokens` and the extra `log_sum_p2`, which is `log Σ_v p_v²` at each of these.
    """
    assert policy.tokens is not None
    relative = policy.tokens - policy.extras["log_sum_p2"]
    means = sequences.sum_per_sequence(relative) / sequences.length.clamp(min=1)
    return means[pair_index].sum(dim=-1).exp()
