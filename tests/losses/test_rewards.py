"""The rewards of losses: by hand, and in agreement with what the losses compare."""

from math import log, log1p
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from dpo_wrapper.losses import (
    AOT,
    BCO,
    CPO,
    DPOP,
    EXO,
    IPO,
    KTO,
    NCA,
    ORPO,
    SFT,
    SPPO,
    AlphaPO,
    AOTUnpaired,
    APODown,
    APOZero,
    BetaDPO,
    CombinedLoss,
    DiscoPOP,
    Hinge,
    Loss,
    PairLogProbs,
    PairLoss,
    PlackettLuce,
    ReferenceFree,
    Robust,
    Sigmoid,
    SigmoidNorm,
    SimPO,
)
from dpo_wrapper.metrics import pair_metrics
from helpers.every_loss import EVERY_LOSS, LOSS_CLASSES, loss_id
from helpers.pair_log_probs import example_pair, index_pairs, is_close, random_pairs
from helpers.ranked_batches import doubles

LN2 = log(2)


def is_ahead(loss: Loss, pairs: PairLogProbs) -> float:
    """The accuracy that the metrics report."""
    return pair_metrics(pairs, loss, torch.float64)["rewards/accuracies"].item()


# by hand: p_w = -4, p_l = -9, a = 2, b = -4, with 2 and 4 scored tokens

PER_TOKEN = {IPO, SigmoidNorm}
OF_THE_POLICY = {ReferenceFree, CPO}
OF_THE_POLICY_PER_TOKEN = {SimPO, ORPO, AlphaPO}


@pytest.mark.parametrize("loss_class", [loss for loss in LOSS_CLASSES if loss is not SFT])
def test_rewards_by_hand(loss_class: Any):
    loss = loss_class(beta=0.3, alpha=0.0) if loss_class is AlphaPO else loss_class(beta=0.3)
    if loss_class in PER_TOKEN:
        expected = [0.3 * 2 / 2, 0.3 * -4 / 4]
    elif loss_class in OF_THE_POLICY:
        expected = [0.3 * -4, 0.3 * -9]
    elif loss_class in OF_THE_POLICY_PER_TOKEN:
        expected = [0.3 * -4 / 2, 0.3 * -9 / 4]
    else:
        expected = [0.3 * 2, 0.3 * -4]
    assert is_close(torch.cat(loss.rewards(example_pair())), expected)


@pytest.mark.parametrize("loss_class", [loss for loss in LOSS_CLASSES if loss is not SFT])
def test_rewards_per_token_do_not_grow_with_the_length(loss_class: Any):
    policy, reference, length = doubles([-4.0]), doubles([-6.0]), torch.tensor([2])
    once, twice = (loss_class().reward(policy * k, reference * k, length * k) for k in (1, 2))
    assert once.item() != 0 and is_close(twice, once.tolist()) == loss_class.is_per_token


def test_alpha_po_by_hand():
    # means -2 and -9/4, α = ln 2: f(-2) = (1 - 2²) / ln 2
    chosen, rejected = AlphaPO(beta=0.5, alpha=LN2).rewards(example_pair())
    assert is_close(torch.cat([chosen, rejected]), [0.5 * -3 / LN2, 0.5 * (1 - 2**2.25) / LN2])


def test_lists_and_rows_by_hand():
    policy, reference, length = doubles([-1.0, -2.0]), doubles([-3.0, -1.0]), torch.tensor([2, 5])
    for loss in (PlackettLuce(0.5), KTO(0.5, desirable=7.0)):
        assert loss.reward(policy, reference, length).tolist() == [1.0, -0.5]


@pytest.mark.parametrize("loss", [loss for loss in EVERY_LOSS if hasattr(loss, "divergence")], ids=loss_id)
def test_rewards_of_sums_are_the_same_for_every_divergence(loss: Any):
    chosen, _ = loss.rewards(example_pair())
    score = loss.divergence(doubles([2.0])) / 2 if type(loss) in PER_TOKEN else 2.0
    assert is_close(chosen, [loss.beta * float(score)])


# the rewards of a sum


def make_function() -> Any:
    def function(pairs: PairLogProbs) -> Tensor:
        return -pairs.chosen

    return function


def half_of_policy(policy: Tensor, reference: Tensor | None, length: Tensor) -> Tensor:
    return policy / 2


def rewards_of_sum(loss: Any) -> tuple[Tensor, Tensor]:
    reward_loss = CombinedLoss(loss).reward_loss
    assert isinstance(reward_loss, PairLoss)
    return reward_loss.rewards(example_pair())


def test_the_first_loss_that_has_rewards_gives_those_of_a_sum():
    first = CombinedLoss([(SFT(), 1.0), (SimPO(), 0.5), (Sigmoid(), 2.0)])
    assert first.reward_loss == SimPO()
    assert CombinedLoss(SFT()).reward_loss is None

    function = make_function()
    rewards = rewards_of_sum([(function, 1.0), (Sigmoid(), 1.0)])
    assert is_close(torch.cat(rewards), [2.0, -4.0])
    function.reward = half_of_policy
    rewards = rewards_of_sum(function)
    assert is_close(torch.cat(rewards), [-2.0, -4.5])
    function.has_rewards = False
    assert CombinedLoss([(function, 1.0), (Sigmoid(), 1.0)]).reward_loss == Sigmoid()


def test_a_reward_that_is_no_value_per_completion_is_refused():
    function = make_function()
    function.reward = lambda policy, reference, length: policy.mean()
    message = r"a reward should give one value per completion, shape \(1,\), but function.reward gave \(\)"
    with pytest.raises(ValueError, match=message):
        rewards_of_sum(function)


def test_a_loss_without_beta_has_log_ratios_as_rewards():
    class Squared(PairLoss):
        def __call__(self, pairs: PairLogProbs) -> Tensor:
            return (pairs.chosen_logratio - pairs.rejected_logratio).square()

    assert is_close(torch.cat(Squared().rewards(example_pair())), [2.0, -4.0])


# rewards and losses

TIED: dict[type, Any] = {
    Sigmoid: lambda loss, pairs: LN2,
    SigmoidNorm: lambda loss, pairs: LN2,
    Robust: lambda loss, pairs: LN2,
    Hinge: lambda loss, pairs: 1,
    IPO: lambda loss, pairs: (0.5 / loss.beta) ** 2,
    EXO: lambda loss, pairs: -LN2 - (log1p(-loss.label_smoothing) + log(loss.label_smoothing)) / 2,
    DPOP: lambda loss, pairs: LN2,
    AOT: lambda loss, pairs: LN2,
    AOTUnpaired: lambda loss, pairs: LN2,
    BetaDPO: lambda loss, pairs: LN2,
    NCA: lambda loss, pairs: 2 * LN2,
    BCO: lambda loss, pairs: 2 * LN2,
    SPPO: lambda loss, pairs: 0.5 / loss.beta**2,
    APOZero: lambda loss, pairs: 1,
    ReferenceFree: lambda loss, pairs: LN2,
    CPO: lambda loss, pairs: LN2 + loss.alpha * pairs.chosen_nll.item(),
    SimPO: lambda loss, pairs: F.softplus(doubles([loss.gamma])).item(),
    AlphaPO: lambda loss, pairs: F.softplus(doubles([loss.gamma])).item(),
    ORPO: lambda loss, pairs: loss.beta * LN2 + pairs.chosen_nll.item(),
}
"""The smallest value of each loss for a pair whose two rewards are equal."""

FALLS_ALWAYS = (
    *(Sigmoid, SigmoidNorm, Robust, Hinge, AOT, AOTUnpaired, BetaDPO, APOZero),
    *(ReferenceFree, CPO, SimPO, AlphaPO, ORPO),
)
"""Losses that are smaller the larger the margin, where labels are not smoothed."""


def falls_always(loss: Any) -> bool:
    return isinstance(loss, FALLS_ALWAYS) and (
        isinstance(loss, Robust) or not getattr(loss, "label_smoothing", 0)
    )


def test_the_table_knows_every_loss():
    """SFT has no rewards; DiscoPOP is no function with one dip; APODown lowers chosen."""
    assert {*TIED, SFT, DiscoPOP, APODown} == {*LOSS_CLASSES}


@pytest.mark.parametrize("loss", [loss for loss in EVERY_LOSS if type(loss) in TIED], ids=loss_id)
@given(pairs=random_pairs(lowest=-5.0, highest=-0.05, max_length=9))
@settings(max_examples=30, derandomize=True)
def test_a_loss_below_that_of_a_tie_has_chosen_ahead(loss: Any, pairs: PairLogProbs):
    for k in range(len(pairs.chosen)):
        pair = index_pairs(pairs, [k])
        chosen, rejected = (side.item() for side in loss.rewards(pair))
        tied = TIED[type(loss)](loss, pair)
        value = loss(pair).item()
        if value < tied - 1e-9:
            assert is_ahead(loss, pair) == 1 and chosen > rejected
        if falls_always(loss) and value > tied + 1e-9:
            assert is_ahead(loss, pair) == 0 and chosen < rejected
        if falls_always(loss) and abs(value - tied) < 1e-13:
            assert chosen == pytest.approx(rejected, abs=1e-9)


@given(pairs=random_pairs(lowest=-20.0, max_length=9))
@settings(max_examples=100, derandomize=True)
def test_ipo_is_below_its_value_at_a_tie_for_margins_between_0_and_1(pairs: PairLogProbs):
    loss = IPO(0.4)
    chosen, rejected = loss.rewards(pairs)
    for value, margin in zip(loss(pairs).tolist(), (chosen - rejected).tolist(), strict=True):
        if min(abs(margin), abs(margin - 1)) > 1e-9:
            assert (value < 1 / (4 * 0.4**2)) == (0 < margin < 1)


def test_simpo_per_token_where_sums_would_say_the_opposite():
    """200 tokens at -1 against 20 at -2: the sums are -200 and -40, the means -1 and -2."""
    lengths = torch.tensor([200]), torch.tensor([20])
    pairs = PairLogProbs(doubles([-200.0]), doubles([-40.0]), None, None, *lengths, doubles(200.0))
    chosen, rejected = SimPO(beta=2.0).rewards(pairs)
    assert chosen.item() == -2 and rejected.item() == -4 and is_ahead(SimPO(beta=2.0), pairs) == 1
    assert is_ahead(ReferenceFree(), pairs) == 0
