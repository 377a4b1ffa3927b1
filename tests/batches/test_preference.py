"""Batches of preference pairs: the log-probs that losses get from them."""

from math import log

import pytest
import torch
from torch import Tensor

from dpo_wrapper import IPO, SFT, PreferenceBatch, SigmoidNorm, SimPO
from dpo_wrapper.batches.sequences import SequenceLogProbs
from helpers.pair_log_probs import sigmoid


@pytest.mark.pitfall(16)
@pytest.mark.parametrize("width", [3, 4, 20])
def test_lengths_are_those_of_scored_tokens_whatever_the_width(width: int):
    # 7 | 1 2 and 7 | 3, the prompt before the bar; log-probs -3 and -5, under the reference -1 both
    def pad(values: list, filler) -> Tensor:
        return torch.tensor([values + [filler] * (width - len(values))])

    seqs = (pad([7, 1, 2], 9), pad([7, 3], 9))
    prompts = tuple(pad([True], False) for _ in seqs)
    reals = (pad([True] * 3, False), pad([True] * 2, False))
    batch = PreferenceBatch.from_padded(seqs, prompts, reals)
    policy = SequenceLogProbs(torch.tensor([-3.0, -5.0]).double())
    pairs = batch.log_probs(policy, SequenceLogProbs(torch.tensor([-1.0, -1.0]).double()))
    expected = [
        (-2 / 2 - -4 / 1 - 1 / 2) ** 2,  # 6.25
        -log(sigmoid(-2 / 2 - -4 / 1)),
        -log(sigmoid(-3 / 2 - -5 / 1)),
        3 / 2,
    ]
    losses = (IPO(1.0), SigmoidNorm(1.0), SimPO(1.0, 0.0), SFT())
    assert [loss(pairs).item() for loss in losses] == pytest.approx(expected, rel=1e-12)
