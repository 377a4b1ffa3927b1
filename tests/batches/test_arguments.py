"""Arguments of a DPO call: dtypes of ids, given log-probs of the reference."""

import pytest
import torch

from dpo_wrapper import DPO, PreferenceBatch
from helpers.dpo_calls import nudged
from helpers.models import ZOO
from helpers.naive_dpo import ARGUMENTS, CASE, naive_sums


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32])
def test_ids_of_any_integer_dtype(dtype):
    dpo = DPO(nudged(ZOO["xt-rotary"](0)), reference=ZOO["xt-rotary"](0))
    narrow = {k: ARGUMENTS[k].to(dtype) for k in ("preferred_seq", "unpreferred_seq")}
    assert dpo(**ARGUMENTS | narrow) == dpo(**ARGUMENTS)


def test_given_reference_log_probs_go_by_pairs():
    """In a batch whose sequences stand in another order: chosen and rejected in turn."""
    dpo = DPO(nudged(ZOO["xt-rotary"](0)), reference=ZOO["xt-rotary"](0))
    seqs = (CASE.preferred_seq, CASE.unpreferred_seq)
    batch = PreferenceBatch.from_padded(seqs, CASE.prompt_masks, CASE.seq_masks)
    with torch.no_grad():
        given = tuple(naive_sums(dpo.ref_model))
    expected = dpo(batch, ref_log_probs=given)
    assert torch.allclose(expected, dpo(batch), atol=1e-6)
    turned = batch.pair_index.flip(0)  # the last pair first
    swapped = type(batch)(batch.sequences, turned)
    assert torch.allclose(
        dpo(swapped, ref_log_probs=tuple(side.flip(0) for side in given)), expected, atol=1e-6
    )
