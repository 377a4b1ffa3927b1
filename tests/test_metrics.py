"""Ties within rounding, losses without rewards, and how metrics are printed."""

import copy
import math

import pytest
import torch
from torch import Generator

from dpo_wrapper import DPO, PreferenceBatch, sequence_log_probs
from dpo_wrapper.evaluation.report import format_before_and_after
from dpo_wrapper.losses import (
    KTO,
    SFT,
    Loss,
    PairLogProbs,
    PlackettLuce,
    RankedLogProbs,
    Sigmoid,
    SimPO,
    UnpairedLogProbs,
)
from dpo_wrapper.metrics import MetricSums, format_metric, pair_metrics, ranked_metrics, unpaired_metrics
from dpo_wrapper.training.monitoring.report_line import format_metrics
from helpers.batches import random_batch
from helpers.dpo_calls import arguments
from helpers.models import ZOO

LN2 = math.log(2)
F32, BF16 = torch.finfo(torch.float32).eps, torch.finfo(torch.bfloat16).eps


def accuracy(pairs: PairLogProbs, dtype: torch.dtype = torch.float32, loss: Loss | None = None) -> float:
    return pair_metrics(pairs, loss or Sigmoid(0.1), dtype)["rewards/accuracies"].item()


def pair_of_log_ratios(chosen: float, rejected: float = 0.0) -> PairLogProbs:
    """One pair of reference log-probs -96 over 16 tokens a side, in float32."""
    columns = torch.tensor([[-96.0 + chosen], [-96.0 + rejected], [-96.0], [-96.0]])
    lengths = torch.tensor([16]), torch.tensor([16])
    return PairLogProbs(*columns, *lengths, mean_chosen_length=torch.tensor(16.0))


# a side's log-ratio is off by ε √(96² + 96²) / √16 = ε 24 √2, and the difference of two by √2 times that
@pytest.mark.parametrize(
    "dtype, epsilon", [(torch.float32, 103 * F32), (torch.bfloat16, 3 * BF16 + 100 * F32)], ids=str
)
def test_a_difference_counts_half_up_to_rounding_and_whole_above(dtype: torch.dtype, epsilon: float):
    limit = 48 * epsilon
    for difference, expected in ((0.97 * limit, 0.5), (1.03 * limit, 1.0)):
        assert accuracy(pair_of_log_ratios(difference), dtype) == expected
        assert accuracy(pair_of_log_ratios(-difference), dtype) == 1 - expected
        assert accuracy(pair_of_log_ratios(0.0, -difference), dtype) == expected
        for loss in (Sigmoid(5.0), SimPO(2.0)):  # of SimPO the reference has no part: √2 less
            factor = 1.0 if isinstance(loss, Sigmoid) else 2**-0.5
            assert accuracy(pair_of_log_ratios(factor * difference), dtype, loss) == expected


def test_the_margin_stays_what_it_is_at_a_tie():
    metrics = pair_metrics(pair_of_log_ratios(2**-14), Sigmoid(0.5), torch.float32)
    assert metrics["rewards/accuracies"] == 0.5 and metrics["rewards/margins"] == 0.5 * 2**-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 30, 3000])
def test_log_probs_that_are_rounded_differently_are_ties(n: int, dtype: torch.dtype):
    """The reference's log-probs are the policy's but for one rounding, and are summed in another order."""
    generator = Generator().manual_seed(n)
    tokens = -10 * torch.rand(2, 64, n, generator=generator).square()
    noisy = tokens * (1 + torch.finfo(dtype).eps * torch.rand(tokens.shape, generator=generator))
    policy, reference = tokens.flip(-1).cumsum(-1)[..., -1], noisy.sum(-1)
    assert (policy != reference).any()
    lengths = torch.full((64,), n)
    pairs = PairLogProbs(*policy, *reference, lengths, lengths, mean_chosen_length=torch.tensor(float(n)))
    assert accuracy(pairs, dtype) == 0.5


def test_an_untrained_policy_ties_with_a_reference_in_another_dtype():
    policy = ZOO["hf-llama"](0).eval()
    reference = copy.deepcopy(policy).double()
    ids = torch.randint(1, 37, (2, 20, 12), generator=Generator().manual_seed(0))
    is_prompt = torch.arange(12).expand(20, -1) < 3
    with torch.no_grad():
        sums = tuple(sequence_log_probs(reference, side, ~is_prompt).float() for side in ids)
        metrics = DPO(policy)(*ids, is_prompt, ref_log_probs=sums, return_metrics=True)[1]
    assert metrics["rewards/margins"] != 0, "there was no rounding"
    assert metrics["rewards/accuracies"] == 0.5


def test_lists_and_rows_tie_within_rounding():
    policy = torch.tensor([[-90.0, -90.00001, -89.0], [-90.0, -90.00001, -90.00001]])
    lists = RankedLogProbs(policy, torch.full_like(policy, -90.0), torch.ones(2, 3).bool())
    found = ranked_metrics(lists, PlackettLuce(), torch.float32)["rewards/accuracies"]
    assert found == ((0.5 + 0 + 0) / 3 + 0.5) / 2
    label = torch.tensor([True, False, True])
    # 0 and -0.00001 tie with the estimate, 1 is above it
    for kl in (0.0, 1e-6, -3.0):
        rows = UnpairedLogProbs(policy[0], torch.full((3,), -90.0), label, torch.tensor(kl))
        assert unpaired_metrics(rows, KTO(), torch.float32)["rewards/accuracies"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("reference_dtype, expected", [(None, 1.0), (torch.bfloat16, 0.5)], ids=str)
def test_the_narrowest_dtype_of_policy_and_reference_decides(reference_dtype, expected: float):
    """All pairs are 0.001 nats ahead: more than what float32 rounds, less than what bfloat16 does."""
    dpo = DPO(ZOO["hf-llama"](0), reference="copy", reference_dtype=reference_dtype)
    batch = PreferenceBatch.from_lists([[1, 2], [3]], [[4, 5, 6], [7, 8, 9]], [[6, 7, 8], [5, 4, 3]])
    with torch.no_grad():
        chosen, rejected = dpo.policy(batch.sequences).sums[batch.pair_index].unbind(dim=-1)
        metrics = dpo(batch, ref_log_probs=(chosen - 1e-3, rejected), return_metrics=True)[1]
    assert metrics["rewards/accuracies"] == expected
    assert metrics["rewards/margins"].item() == pytest.approx(1e-4, rel=0.1)


def test_lists_and_rows_may_have_no_rewards():
    policy, label = torch.tensor([-1.0, -2.0]), torch.tensor([True, False])
    lists = RankedLogProbs(policy[None], None, torch.ones(1, 2).bool())
    rows = UnpairedLogProbs(policy, None, label, torch.tensor(0.0))
    for metrics in (ranked_metrics(lists, None, torch.float32), unpaired_metrics(rows, None, torch.float32)):
        sums = MetricSums()
        sums.add(metrics | {"rows/valid": torch.tensor(2.0)})
        assert sums.result()["logps/chosen"] == -1.0
        assert not any(name.startswith("rewards/") for name in sums.result())


def test_a_loss_without_rewards_reports_none():
    case = random_batch(Generator().manual_seed(1), b=4, odd=0)
    metrics = DPO(ZOO["hf-llama"](0), loss=SFT())(**arguments(case), return_metrics=True)[1]
    assert not any(name.startswith("rewards/") for name in metrics)
    assert {"loss", "logps/chosen", "logps/rejected", "pairs/valid"} <= metrics.keys()


@pytest.mark.parametrize(
    "template, value, text",
    [
        ("{:.3f}", -1e-9, "0.000"),
        ("{:.3f}", -0.0, "0.000"),
        ("{:.1%}", -1e-9, "0.0%"),
        ("{:.3f}", -0.0006, "-0.001"),
        ("{:.3f}", -math.inf, "-inf"),
        ("{:.3f}", math.nan, "nan"),
        ("{:.3f}", 10.0, "10.000"),
    ],
)
def test_a_zero_has_no_sign(template: str, value: float, text: str):
    assert format_metric(template, value) == text


def test_a_run_prints_its_first_margin_without_a_sign():
    metrics = {"loss": LN2, "rewards/margins": -1e-9, "rewards/accuracies": 0.5, "kl/chosen": -1e-9}
    assert "  ".join(format_metrics(metrics)) == "loss 0.6931  accuracy  50%  margin  0.000  chosen   0.00"
    table = format_before_and_after([metrics | {"part": "eval"}])
    assert "reward margin" in table and "0.000" in table and "-0.000" not in table
