"""From the arguments of `DPO.forward` to a batch, with all checks that need no model."""

from typing import Any

from torch import Tensor

from dpo_wrapper.batches.batch import Batch
from dpo_wrapper.batches.preference import PreferenceBatch
from dpo_wrapper.validation import check_pair_values, check_prompt_mask, check_seq_masks, check_sequences


def batch_from_arguments(
    preferred_seq: Tensor | Batch,
    unpreferred_seq: Tensor | None,
    prompt_mask: Tensor | tuple[Tensor, Tensor] | None,
    seq_mask: Tensor | tuple[Tensor, Tensor] | None,
    preferred_seq_mask: Tensor | None,
    unpreferred_seq_mask: Tensor | None,
    pair_weights: Tensor | None,
    margins: Tensor | None,
    pad_id: int | None,
) -> Any:
    """The batch of a call of `DPO`, checked; a ready-made batch passes if it is given alone.

    Raises:
        TypeError, ValueError: arguments that do not fit one another.
    """
    side_masks = (preferred_seq_mask, unpreferred_seq_mask)
    if isinstance(preferred_seq, Batch):
        others = (unpreferred_seq, prompt_mask, seq_mask, *side_masks, pair_weights, margins)
        if any(argument is not None for argument in others):
            name = type(preferred_seq).__name__
            raise TypeError(f"a {name} holds ids, masks and weights already: give it alone.")
        preferred_seq.check()
        return preferred_seq
    seqs = check_sequences(preferred_seq, unpreferred_seq)
    prompt_masks = check_prompt_mask(prompt_mask, seqs)
    seq_masks = check_seq_masks(seq_mask, side_masks, seqs, pad_id)
    pairs, device = len(seqs[0]), seqs[0].device
    if pair_weights is not None:
        check_pair_values("pair_weights", pair_weights, pairs, device, minimum=0.0)
    if margins is not None:
        check_pair_values("margins", margins, pairs, device)
    return PreferenceBatch.from_padded(seqs, prompt_masks, seq_masks, pair_weights, margins)
