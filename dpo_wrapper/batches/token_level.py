"""What looks below the sums of sequences, at single tokens: LD-DPO's shorter sums and WPO's weights."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpo_wrapper.batches.sequences import PreferenceBatch, ScoredSequences
from dpo_wrapper.losses import PairLogProbs, PromptedLogProbs, WeightedLosses, check_columns


def places(sequences: ScoredSequences) -> Int[Tensor, "t"]:
    """The how-manieth scored token of its sequence each one is, from 0."""
    first = sequences.length.cumsum(dim=0) - sequences.length
    return torch.arange(len(sequences.row), device=sequences.row.device) - first[sequences.row]


def shortened_sums(
    batch: PreferenceBatch, scores: Float[Tensor, "t"], alpha: float
) -> tuple[Float[Tensor, "p"], Float[Tensor, "p"]]:
    """The sums of chosen and rejected of the valid pairs, in which what the longer side has more counts less.

    A side's sum is its first `min(n_w, n_l)` scores plus `alpha` times the rest: LD-DPO, Liu 2024 (arXiv
    2409.06411). α = 1 gives the plain sums.
    """
    sequences, pairs = batch.sequences, batch.pairs[batch.valid]
    width = max(1, int(sequences.length.max())) if len(sequences.length) else 1
    table = scores.new_zeros(len(sequences.length), width)
    table = table.index_put((sequences.row, places(sequences)), scores)
    shared = sequences.length[pairs].amin(dim=-1, keepdim=True)
    counts = torch.where(torch.arange(width, device=scores.device) < shared, 1.0, alpha).to(scores.dtype)
    chosen, rejected = ((table[side] * counts).sum(dim=-1) for side in pairs.unbind(dim=-1))
    return chosen, rejected


def desensitized(
    pairs: PairLogProbs,
    batch: PreferenceBatch,
    alpha: float,
    policy: Float[Tensor, "t"],
    reference: Float[Tensor, "t"] | None,
) -> PairLogProbs:
    """The pairs with shortened sums, policy and reference alike; the likelihood of chosen stays whole."""
    chosen, rejected = shortened_sums(batch, policy, alpha)
    pairs = replace(pairs, chosen=chosen, rejected=rejected, whole_chosen=pairs.chosen)
    if reference is None:
        return pairs
    ref_chosen, ref_rejected = shortened_sums(batch, reference.to(policy.dtype), alpha)
    return replace(pairs, ref_chosen=ref_chosen, ref_rejected=ref_rejected)


def prompted_log_probs(batch: PreferenceBatch, whole: Float[Tensor, "p"]) -> PromptedLogProbs:
    """Log-probs of prompt and chosen together, with the mean number of tokens over the whole step."""
    tokens, pairs = batch.step_whole_tokens, batch.step_pairs
    if pairs is None:
        pairs, _, tokens = batch.counts()
    assert tokens is not None  # as_part_of gives both
    return PromptedLogProbs(whole, whole.new_tensor(tokens / max(1, pairs)))


@torch.no_grad()
def wpo_weights(
    batch: PreferenceBatch, scores: Float[Tensor, "t"], log_square_sums: Float[Tensor, "t"]
) -> Float[Tensor, "p"]:
    """A weight for each pair: how like the policy's own writing it is. WPO, Zhou 2024 (arXiv 2406.11827).

    The product over both sides of `exp(mean_t[log p_t - log Σ_v p_v²])`, without a gradient. Pairs without a
    scored token on a side have weight 1 there; they are not valid anyhow.

    Args:
        scores: the policy's log-prob of each scored token, nats.
        log_square_sums: `log Σ_v p_v²` of the policy's distribution at each of these.
    """
    sequences = batch.sequences
    means = sequences.sums(scores - log_square_sums) / sequences.length.clamp(min=1)
    return means[batch.pairs].sum(dim=-1).exp()


def weighted_by_policy(
    pairs: PairLogProbs,
    batch: PreferenceBatch,
    scores: Float[Tensor, "t"],
    log_square_sums: Float[Tensor, "t"],
) -> PairLogProbs:
    """The pairs with WPO's weights, times those that the data gives."""
    weights = wpo_weights(batch, scores, log_square_sums)[batch.valid]
    return replace(
        pairs, pair_weights=weights if pairs.pair_weights is None else pairs.pair_weights * weights
    )


def check_wpo(wpo: object, losses: WeightedLosses) -> bool:
    """Whether each pair's loss is to be weighted, if it can be."""
    if not isinstance(wpo, bool):
        raise TypeError(f"wpo should be True or False, but it is {wpo!r}.")
    if wpo and losses[0][0].data is not PairLogProbs:
        raise ValueError(
            f"wpo weights pairs, and {type(losses[0][0]).__name__} learns from other data: leave it out."
        )
    if wpo:
        check_columns(losses, margins=False, pair_weights=True)
    return wpo
