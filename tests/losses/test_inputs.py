"""The log-probs that losses take."""

import pytest
import torch

from helpers.pair_log_probs import make_pairs


def test_logratios_by_hand():
    pair = make_pairs([-4.0], [-9.0], [-6.0], [-5.0])
    assert pair.chosen_logratio.tolist() == [2.0] and pair.rejected_logratio.tolist() == [-4.0]
    pair = make_pairs([-4.0], [-9.0])
    assert pair.chosen_logratio is pair.chosen and pair.rejected_logratio is pair.rejected


def test_half_precision_is_widened():
    pair = make_pairs([-4.0], [-9.0], [-6.0], [-5.0], dtype=torch.bfloat16)
    assert pair.chosen.dtype == pair.ref_chosen.dtype == torch.float32


def test_sides_of_different_lengths_are_refused():
    with pytest.raises(Exception, match="p"):
        make_pairs([-1.0, -2.0], [-1.0])
