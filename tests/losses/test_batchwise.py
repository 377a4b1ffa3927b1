"""Losses that compare the pairs of a batch, and the running statistics of BetaDPO."""

import copy
from dataclasses import replace
from math import exp, log, log1p

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator

from dpo_wrapper import DPO, PairLogProbs, PairLoss, PreferenceBatch
from dpo_wrapper.losses import AOT, AOTUnpaired, BetaDPO, CombinedLoss, Sigmoid
from dpo_wrapper.losses.batchwise import RunningStatistics
from helpers.batches import random_batch
from helpers.models import ZOO
from helpers.pair_log_probs import (
    SETTINGS,
    example_pair,
    index_pairs,
    is_close,
    make_pairs,
    policy_grads,
    random_pairs,
    sigmoid,
)

LN3 = log(3)


def pairs_with_differences(*differences: float) -> PairLogProbs:
    """Pairs with these values of A = a - b."""
    return make_pairs([0.0] * len(differences), [-value for value in differences])


def test_aot_by_hand():
    # p_w - p_l is 5 and 1, r_w - r_l is 2 and 4: sorted, 1 - 2 and 5 - 4
    pairs = make_pairs([-1.0, -4.0], [-6.0, -5.0], [-1.0, -1.0], [-3.0, -5.0])
    assert is_close(AOT(LN3)(pairs), [log(4), log(4 / 3)])


def test_aot_unpaired_by_hand():
    # a is 2 and -1, b is 0 and -3: sorted, -1 + 3 and 2 - 0
    pairs = make_pairs([-1.0, -2.0], [-1.0, -4.0], [-3.0, -1.0], [-1.0, -1.0])
    assert is_close(AOTUnpaired(LN3 / 2)(pairs), [log(4 / 3), log(4 / 3)])


@given(random_pairs(), st.floats(1e-3, 10.0))
@SETTINGS
def test_a_single_pair_or_a_fixed_beta_gives_sigmoid(pairs: PairLogProbs, beta: float):
    first = index_pairs(pairs, slice(1))
    for loss in (AOT(beta, 0.1), AOTUnpaired(beta, 0.1)):
        torch.testing.assert_close(loss(first), Sigmoid(beta, 0.1)(first))
    torch.testing.assert_close(BetaDPO(beta, k=0.0)(pairs), Sigmoid(beta)(pairs), rtol=1e-9, atol=1e-9)


@given(random_pairs(min_pairs=2))
@SETTINGS
def test_the_order_of_pairs_changes_nothing(pairs: PairLogProbs):
    reverse = index_pairs(pairs, list(range(len(pairs.chosen)))[::-1])
    for loss in (AOT(), AOTUnpaired(), BetaDPO()):
        torch.testing.assert_close(loss(pairs).sum(), loss(reverse).sum())
        for left, right in zip(policy_grads(loss, pairs), policy_grads(loss, reverse), strict=True):
            torch.testing.assert_close(left.sum(), right.sum())


# BetaDPO


def test_beta_dpo_by_hand():
    # A is 6 and 2, their mean 4; M = 0.1 4 at the first step: β' = β (1 + k 3.6) = 2.8 β
    pairs = make_pairs([-1.0, -1.0], [-7.0, -3.0], [-1.0, -1.0], [-1.0, -1.0])
    loss = BetaDPO(LN3 / 5.6, k=0.5)
    assert is_close(loss(pairs), [log(28 / 27), log(4 / 3)])
    # β' is no part of the gradient
    assert is_close(policy_grads(loss, pairs)[0][1:], [-2.8 * LN3 / 5.6 / 4])
    # where M has been 30: M = 27.4, β' would be below 0 and is 0.001
    loss.statistics.mean.fill_(30.0)
    assert is_close(loss(pairs), [log1p(exp(-6e-3)), log1p(exp(-2e-3))])


def test_beta_dpo_subtracts_margins():
    pair = replace(example_pair(), margins=torch.tensor([LN3], dtype=torch.float64))
    assert is_close(BetaDPO(LN3 / 3, k=0.0)(pair), [log(4 / 3)])  # βΔ = 2 ln 3, less ln 3


def test_beta_dpo_drops_pairs_far_from_the_mean():
    differences = [1.0, 1.1, 0.9, 500.0]
    pairs, loss, fixed_beta = (
        pairs_with_differences(*differences),
        BetaDPO(drop=0.25),
        BetaDPO(drop=0.25, k=0.0),
    )
    for with_statistics in (loss, fixed_beta):
        with_statistics.statistics.mean.fill_(1.0)
        with_statistics.statistics.std.fill_(0.1)
    for seed in range(5):
        torch.manual_seed(seed)
        values = loss(pairs)
        assert values[3] == 0 and (values[:3] > 0).all()
    # the mean over all pairs is the mean over those that are kept
    expected = sum(-log(sigmoid(0.1 * value)) for value in differences[:3]) / 3
    assert fixed_beta(pairs).mean().item() == pytest.approx(expected)
    assert (BetaDPO(drop=0.9)(pairs_with_differences(1.0)) > 0).all()
    assert not loss.is_deterministic and BetaDPO().is_deterministic


def test_running_statistics_move_once_per_step_by_hand():
    loss = BetaDPO()
    # mean 4 and standard deviation √(((6 - 4)² + (2 - 4)²) / 1) = √8, of which a tenth is added to 0
    loss.observe(pairs_with_differences(6.0))
    loss.observe(pairs_with_differences(2.0))
    assert loss.statistics.mean == 0 == loss.statistics.std
    loss.end_step()
    assert loss.statistics.mean.item() == pytest.approx(0.4)
    assert loss.statistics.std.item() == pytest.approx(0.1 * 8**0.5)
    # a single pair has no deviation
    loss.observe(pairs_with_differences(-1.0))
    loss.end_step()
    assert loss.statistics.mean.item() == pytest.approx(0.9 * 0.4 - 0.1)
    assert loss.statistics.std.item() == pytest.approx(0.09 * 8**0.5)
    # a step without pairs moves nothing
    before = loss.statistics.mean.clone()
    loss.end_step()
    assert torch.equal(loss.statistics.mean, before)


def test_calls_move_no_statistics():
    loss = BetaDPO()
    for _ in range(2):
        loss(pairs_with_differences(6.0, 2.0))
    assert loss.statistics.mean == 0 and loss.statistics.step_sums == [0.0, 0.0, 0.0]


def test_each_loss_and_each_copy_has_its_own_statistics():
    first, second = BetaDPO(), BetaDPO()
    first.observe(pairs_with_differences(6.0, 2.0))
    first.end_step()
    duplicate = copy.deepcopy(first)
    first.observe(pairs_with_differences(5.0))
    first.end_step()
    assert second.statistics.mean == 0 and duplicate.statistics.mean.item() == pytest.approx(0.4)
    assert first.statistics.mean.item() == pytest.approx(0.86)


def test_combined_losses_save_and_load_the_statistics():
    source, target = CombinedLoss([(Sigmoid(), 1.0), (BetaDPO(), 0.5)]), CombinedLoss(BetaDPO())
    source.observe(pairs_with_differences(6.0, 2.0), is_whole_step=True)
    target.load_state_dict(source.state_dict())
    assert vars(target.terms[0][0])["statistics"].mean.item() == pytest.approx(0.4)
    assert not CombinedLoss(Sigmoid()).state_dict()


# through DPO


def build_dpo(loss: PairLoss) -> DPO:
    return DPO(ZOO["xt-rotary"](0).double(), loss=loss, reference=ZOO["xt-rotary"](1).double())


def build_batch() -> PreferenceBatch:
    case = random_batch(Generator().manual_seed(2), b=4, odd=0.0)
    return PreferenceBatch.from_padded(
        (case.preferred_seq, case.unpreferred_seq), case.prompt_masks, case.seq_masks
    )


def split_batch(batch: PreferenceBatch, pairs: int) -> list[PreferenceBatch]:
    """Two parts of a step, of which the first has so many pairs."""
    parts = (batch.pair_index[:pairs], batch.pair_index[pairs:])
    return [replace(batch, pair_index=part).with_step_totals(*batch.step_totals()) for part in parts]


def statistics_of(dpo: DPO) -> RunningStatistics:
    return vars(dpo.loss.terms[0][0])["statistics"]


def assert_same_statistics(left: DPO, right: DPO) -> None:
    torch.testing.assert_close(statistics_of(left).mean, statistics_of(right).mean)
    torch.testing.assert_close(statistics_of(left).std, statistics_of(right).std, rtol=1e-4, atol=1e-5)


def test_each_step_of_dpo_moves_the_statistics():
    dpo, batch = build_dpo(BetaDPO(0.2, k=0.5)), build_batch()
    assert sum("loss" in name for name in dpo.state_dict()) == 2
    with torch.no_grad():
        pairs = [replace(batch, pair_index=index[None]) for index in batch.pair_index]
        margins = [dpo(pair, return_metrics=True)[1]["rewards/margins"] for pair in pairs]
    differences = torch.stack(margins) / 0.2
    statistics = statistics_of(dpo)
    assert not statistics.mean and statistics.step_sums[0] == 0  # without gradients nothing moves
    mean = std = torch.tensor(0.0)
    for _ in range(3):
        loss = dpo(batch)
        mean, std = 0.9 * mean + 0.1 * differences.mean(), 0.9 * std + 0.1 * differences.std()
        beta = max(0.2 * (1 + 0.5 * (differences.mean() - mean)), 1e-3)
        torch.testing.assert_close(loss, F.softplus(-beta * differences).mean(), rtol=1e-5, atol=0)
        torch.testing.assert_close(statistics.mean, mean.float())
        torch.testing.assert_close(statistics.std, std.float())


def test_a_step_of_several_parts_moves_the_statistics_once():
    whole, split, batch = build_dpo(BetaDPO(0.2)), build_dpo(BetaDPO(0.2)), build_batch()
    for _ in range(2):
        whole(batch).backward()
        before = statistics_of(split).mean.clone()
        for part in split_batch(batch, 1):
            split(part).backward()
            assert torch.equal(statistics_of(split).mean, before)
        split.end_step()
        assert_same_statistics(split, whole)
    split.end_step()  # a step without pairs
    assert_same_statistics(split, whole)

    loaded, duplicate = build_dpo(BetaDPO(0.2)), copy.deepcopy(whole)
    loaded.load_state_dict(whole.state_dict())
    assert_same_statistics(loaded, whole)
    duplicate(batch)
    assert statistics_of(duplicate).mean != statistics_of(whole).mean


@pytest.mark.pitfall(22)
def test_two_processes_move_the_statistics_as_one_does():
    single, processes, batch = (
        build_dpo(BetaDPO(0.2)),
        [build_dpo(BetaDPO(0.2)) for _ in range(2)],
        build_batch(),
    )
    single(batch)
    for process, part in zip(processes, split_batch(batch, 3), strict=True):
        process(part)
    total = torch.tensor([statistics_of(process).step_sums for process in processes]).sum(dim=0)
    processes[0].end_step(lambda sums: total)
    assert_same_statistics(processes[0], single)
