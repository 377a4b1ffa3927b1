"""From sums per sequence to what the losses look at."""

from jaxtyping import Float
from torch import Tensor

from dpo_wrapper.losses import PairLogProbs, RunningGap
from dpo_wrapper.sequences import PreferenceBatch


def pair_log_probs(
    batch: PreferenceBatch,
    policy: Float[Tensor, "s"],
    reference: Float[Tensor, "s"] | None,
    gap: RunningGap | None = None,
) -> PairLogProbs:
    """Sums per sequence as sums per valid pair, with what the data says of these."""
    valid = batch.valid
    chosen, rejected = batch.pairs[valid].unbind(dim=-1)
    lengths = batch.sequences.length
    if batch.step_pairs is not None and batch.step_chosen_tokens is not None:
        mean_length = policy.new_tensor(batch.step_chosen_tokens / max(1, batch.step_pairs))
    else:
        mean_length = lengths[chosen].to(policy.dtype).sum() / max(1, len(chosen))
    return PairLogProbs(
        chosen=policy[chosen],
        rejected=policy[rejected],
        ref_chosen=None if reference is None else reference[chosen].to(policy.dtype),
        ref_rejected=None if reference is None else reference[rejected].to(policy.dtype),
        chosen_length=lengths[chosen],
        rejected_length=lengths[rejected],
        mean_chosen_length=mean_length,
        margins=None if batch.margins is None else batch.margins[valid].to(policy.dtype),
        pair_weights=None if batch.pair_weights is None else batch.pair_weights[valid].to(policy.dtype),
        gap=gap,
    )
