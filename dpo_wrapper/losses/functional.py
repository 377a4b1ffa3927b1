"""The DPO loss as a function of log-probs, for other loops."""

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_wrapper.losses.inputs import PairLogProbs
from dpo_wrapper.losses.pairwise import Sigmoid


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    beta: float = 0.1,
    *,
    ref_chosen_logprobs: Tensor | None = None,
    ref_rejected_logprobs: Tensor | None = None,
) -> Float[Tensor, ""]:
    """The DPO loss as one function: `-log σ(β((p_w - r_w) - (p_l - r_l)))`, mean over the batch.

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7. Without reference log-probs `r = 0`: the simplified form
    `-log σ(β(p_w - p_l))`.

    Args:
        chosen_logprobs, rejected_logprobs: nats; Float[b] sums, or Float[b n] per token (0 where not
            scored), which are summed over n.
        ref_chosen_logprobs, ref_rejected_logprobs: the reference's, of the same shape; both or neither.

    Raises:
        ValueError: unequal shapes, other than one or two dimensions, only one reference, or `beta <= 0`.
    """
    if (ref_chosen_logprobs is None) != (ref_rejected_logprobs is None):
        received = "second" if ref_chosen_logprobs is None else "first"
        raise ValueError(
            "ref_chosen_logprobs and ref_rejected_logprobs should both be given, but only the "
            f"{received} is: add the other or leave both out."
        )
    references = [side.detach() for side in (ref_chosen_logprobs, ref_rejected_logprobs) if side is not None]
    sides = [chosen_logprobs, rejected_logprobs, *references]
    shapes = [tuple(side.shape) for side in sides]
    if len(set(shapes)) > 1 or len(shapes[0]) not in (1, 2):
        raise ValueError(f"log-probs should all have one shape, (b,) or (b, n), but the shapes are {shapes}.")
    if shapes[0][0] == 0:
        raise ValueError(f"log-probs should hold at least one pair, but their shape is {shapes[0]}.")
    sums = [side.to(torch.promote_types(side.dtype, torch.float32)) for side in sides]
    sums = [side.sum(dim=-1) if side.ndim == 2 else side for side in sums]
    lengths = torch.ones_like(sums[0], dtype=torch.long)
    ref_chosen, ref_rejected = sums[2:] or (None, None)
    mean_length = sums[0].new_ones(())
    pairs = PairLogProbs(sums[0], sums[1], ref_chosen, ref_rejected, lengths, lengths, mean_length)
    return Sigmoid(beta)(pairs).mean()
