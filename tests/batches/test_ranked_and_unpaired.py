"""Ranked lists and rows with a label through `DPO` end to end."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_wrapper import DPO, RankedBatch, Sigmoid, UnpairedBatch, sequence_log_probs
from dpo_wrapper.batches import normalize_over_step
from dpo_wrapper.batches.unpaired import kl_partner_indices
from dpo_wrapper.evaluation.evaluate import evaluate
from dpo_wrapper.losses import KTO, PlackettLuce, RankedLogProbs, UnpairedLogProbs
from dpo_wrapper.metrics import MetricSums, batch_metrics
from helpers.models import ZOO
from helpers.pair_log_probs import sigmoid
from helpers.ranked_batches import (
    doubles,
    lists_in_parts,
    lists_of_ids,
    make_lists,
    rows_in_parts,
    rows_of_ids,
)


def models() -> tuple:
    return ZOO["xt-rotary"](0).double(), ZOO["xt-rotary"](1).double()


def sum_of(model, prompt: list[int], completion: list[int]) -> Tensor:
    seq = torch.tensor([prompt + completion])
    return sequence_log_probs(model, seq, torch.arange(seq.shape[1])[None] >= len(prompt))[0]


@pytest.mark.parametrize("share", [True, False])
def test_plackett_luce_end_to_end(share: bool):
    policy, reference = models()
    dpo = DPO(policy, loss=PlackettLuce(0.2), reference=reference, share_prefix=share)
    prompts, completions = lists_of_ids()
    loss, metrics = dpo(RankedBatch.from_lists(prompts, completions), return_metrics=True)
    expected = doubles(0.0)
    for prompt, best_first in zip(prompts, completions, strict=True):
        scores = [0.2 * (sum_of(policy, prompt, y) - sum_of(reference, prompt, y)) for y in best_first]
        for k in range(len(scores)):
            expected = expected - scores[k] + torch.stack(scores[k:]).exp().sum().log()
    torch.testing.assert_close(loss, expected / 3, rtol=1e-5, atol=1e-6)
    found, known = (
        torch.autograd.grad(x, list(policy.parameters()), allow_unused=True) for x in (loss, expected / 3)
    )
    for a, b in zip(found, known, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-6))
    assert metrics["lists/valid"] == 3 and 0 <= metrics["rewards/accuracies"] <= 1


def test_lists_as_pairs():
    batch = RankedBatch.from_lists(*lists_of_ids())
    assert batch.ranks.tolist() == [[0, 1, 2, -1], [3, 4, -1, -1], [5, 6, 7, 8]]
    best = [[0, 1], [0, 2], [3, 4], [5, 6], [5, 7], [5, 8]]
    assert batch.to_preference_batch("best").pair_index.tolist() == best
    every = sorted(batch.to_preference_batch().pair_index.tolist())
    assert every == sorted([*best, [1, 2], [6, 7], [6, 8], [7, 8]])
    policy, reference = models()
    two = RankedBatch.from_lists([[1, 2], [3]], [[[4], [5, 6]], [[7, 8], [9]]])
    values = [
        DPO(policy, loss=loss, reference=reference)(data)
        for loss, data in ((PlackettLuce(0.3), two), (Sigmoid(0.3), two.to_preference_batch()))
    ]
    torch.testing.assert_close(*values)
    with pytest.raises(ValueError, match="ranking should be 'all' or 'best', but it is 'worst'"):
        batch.to_preference_batch("worst")


def test_lists_with_nothing_to_rank_are_left_out():
    policy, reference = models()
    dpo = DPO(policy, loss=PlackettLuce(), reference=reference)
    prompts, completions = lists_of_ids()
    more = RankedBatch.from_lists([*prompts, [1], [2]], [*completions, [[3]], [[], [4]]])
    torch.testing.assert_close(dpo(more), dpo(RankedBatch.from_lists(prompts, completions)))
    headless = RankedBatch.from_lists([[2]], [[[], [4], [5]]])  # the best has no token: the next is the best
    _, metrics = dpo(headless, return_metrics=True)
    assert metrics["rewards/chosen"].isfinite() and metrics["lists/valid"] == 1
    nothing = dpo(RankedBatch.from_lists([[1]], [[[3]]]))
    nothing.backward()
    assert nothing == 0


@pytest.mark.parametrize("share", [True, False])
def test_kto_end_to_end(share: bool):
    policy, reference = models()
    dpo = DPO(policy, loss=KTO(0.2, 1.5, 0.5), reference=reference, share_prefix=share)
    prompts, completions, labels = rows_of_ids()
    loss, metrics = dpo(UnpairedBatch.from_lists(prompts, completions, labels), return_metrics=True)

    def ratio(x: list[int], y: list[int]) -> float:
        return float(sum_of(policy, x, y) - sum_of(reference, x, y))

    apart = [completions[other] for other in kl_partner_indices([tuple(prompt) for prompt in prompts])]
    assert all(y != other for y, other in zip(completions, apart, strict=True))
    shift = sum(ratio(x, y) for x, y in zip(prompts, apart, strict=True)) / 5
    z, expected = max(shift, 0.0), 0.0
    for x, y, label in zip(prompts, completions, labels, strict=True):
        a = ratio(x, y)
        expected += 1.5 * (1 - sigmoid(0.2 * (a - z))) if label else 0.5 * (1 - sigmoid(0.2 * (z - a)))
    assert loss.item() == pytest.approx(expected / 5, rel=1e-5)
    assert metrics["kl"].item() == pytest.approx(shift, rel=1e-4) and metrics["rows/valid"] == 5
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in policy.parameters())


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(0, 3))
@settings(max_examples=200, derandomize=True)
def test_partners_have_other_prompts(prompts: list[int], seed: int):
    found = kl_partner_indices(prompts, seed)
    taken = [other for other in found if other is not None]
    assert len(set(taken)) == len(taken) and kl_partner_indices(prompts, seed) == found
    assert all(other is None or prompts[other] != prompts[k] for k, other in enumerate(found))
    # of a prompt with more than half of the rows only so many find one as there are others
    others = len(prompts) - max(map(prompts.count, prompts))
    assert len(taken) == min(len(prompts), 2 * others)


def test_partners_by_hand():
    assert kl_partner_indices("aabc", seed=1) in ([2, 3, 0, 1], [2, 3, 1, 0], [3, 2, 0, 1], [3, 2, 1, 0])
    assert kl_partner_indices("aa") == [None, None] and kl_partner_indices("") == []
    assert kl_partner_indices("aab").count(None) == 1
    assert len({tuple(kl_partner_indices("abcdefgh", seed)) for seed in range(9)}) > 3


def gradients(loss: Tensor, policy) -> list[Tensor]:
    return [
        g for g in torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True) if g is not None
    ]


@pytest.mark.pitfall(23)
@pytest.mark.parametrize("data", [lists_in_parts, rows_in_parts])
def test_a_step_in_parts_adds_up(data):
    policy, reference = models()
    loss, whole, parts = data()
    dpo = DPO(policy, loss=loss, reference=reference)
    expected, wanted = dpo(whole, return_metrics=True)
    in_parts = normalize_over_step(parts, kl_sums=dpo.kl_sums)
    assert len(in_parts) == len(parts)
    shares = [dpo(part) for part in in_parts]
    torch.testing.assert_close(sum(shares), expected)
    for pair in zip(gradients(sum(shares), policy), gradients(expected, policy), strict=True):
        torch.testing.assert_close(*pair)
    metrics = evaluate(dpo, parts)
    together = ("tokens/unique", "tokens/padded")
    assert metrics.keys() == wanted.keys() and len(wanted) > 12
    for name in wanted.keys() - set(together):
        assert metrics[name] == pytest.approx(wanted[name].item(), rel=1e-6, abs=1e-9), name

    halves = [parts[:1], parts[1:]]  # of two processes
    sums = sum(torch.tensor([part.step_totals() for part in half]).sum(dim=0) for half in halves)
    assert tuple(sums.tolist()) == whole.step_totals()


def test_rows_without_a_common_estimate_have_their_own():
    policy, reference = models()
    _, whole, parts = rows_in_parts()
    dpo = DPO(policy, loss=KTO(0.5), reference=reference)
    total, count = dpo.kl_sums(whole)
    assert count == 4 and not total.requires_grad
    alone = [dpo.kl_sums(part) for part in parts]
    torch.testing.assert_close(sum(alone), torch.stack([total, count]))
    _, metrics = dpo(parts[0], return_metrics=True)
    torch.testing.assert_close(metrics["kl"], alone[0][0])


def test_metrics_of_lists_by_hand():
    # rewards 0.5 times (3, 1, 1, 2) and (-1, 2): of 6 pairs 3 are in order and 1 is tied; of 1 none is
    lists = make_lists(
        [[-1.0, -2.0, -3.0, -2.0], [-4.0, -1.0, 9.0, 9.0]], [[-4.0, -3.0, -4.0, -4.0], [-3.0] * 4]
    )
    real = torch.tensor([[True] * 4, [True, True, False, False]])
    length = torch.tensor([[2, 1, 1, 4], [3, 5, 7, 7]])
    lists = RankedLogProbs(lists.policy, lists.reference, real, length)
    batch = RankedBatch.from_lists([[1]], [[[2], [3]]])
    found = batch_metrics(batch, lists, doubles([1.0, 2.0]), PlackettLuce(0.5))
    expected = {
        "loss": 1.5,
        "rewards/chosen": 0.5 * (3 - 1) / 2,
        "rewards/rejected": 0.5 * (4 / 3 + 2) / 2,
        "rewards/margins": 0.5 * (3 - 4 / 3 - 3) / 2,
        "rewards/accuracies": (3.5 / 6 + 0) / 2,
        "logps/chosen": -2.5,
        "logps/rejected": (-7 / 3 - 1) / 2,
        "logps/ref_chosen": -3.5,
        "logps/ref_rejected": (-11 / 3 - 3) / 2,
        "kl/chosen": 1.0,
        "length/chosen": 2.5,
        "length/rejected": (2 + 5) / 2,
        "lists/valid": 2.0,
        "tokens/unique": 1.0,
        "tokens/padded": 2.0,
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)


def test_metrics_of_rows_by_hand():
    # log-ratios 3, 1 and -1 with an estimate of 1: the first is above, the second is tied, the third below
    policy, reference = doubles([-1.0, -2.0, -5.0]), doubles([-4.0, -3.0, -4.0])
    label = torch.tensor([True, False, False])
    rows = UnpairedLogProbs(policy, reference, label, doubles(1.0), torch.tensor([2, 3, 5]))
    batch = RankedBatch.from_lists([[1]], [[[2], [3]]])
    expected = {
        "loss": 2.0,
        "kl": 1.0,
        "rewards/accuracies": (1 + 0.5 + 1) / 3,
        "rewards/chosen": 0.5 * 3,
        "rewards/rejected": 0.0,
        "rewards/margins": 1.5,
        "logps/chosen": -1.0,
        "logps/rejected": -3.5,
        "logps/ref_chosen": -4.0,
        "logps/ref_rejected": -3.5,
        "kl/chosen": 3.0,
        "length/chosen": 2.0,
        "length/rejected": 4.0,
        "rows/valid": 3.0,
        "rows/chosen": 1.0,
        "rows/rejected": 2.0,
        "tokens/unique": 1.0,
        "tokens/padded": 2.0,
    }
    found = batch_metrics(batch, rows, doubles([1.0, 2.0, 3.0]), KTO(0.5))
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)
    wanted_alone = UnpairedLogProbs(policy[:1], reference[:1], label[:1], doubles(-2.0))
    alone = batch_metrics(batch, wanted_alone, doubles([1.0]), KTO(0.5))
    assert alone["rewards/rejected"] == 0 and alone["rewards/accuracies"] == 1  # a negative KL is none
    sums = MetricSums()
    sums.add(found)
    sums.add(alone)
    both = sums.result()
    assert both["rows/chosen"] == 2 and both["rewards/rejected"] == pytest.approx(0.0)
    assert both["logps/rejected"] == pytest.approx(-3.5) and both["loss"] == pytest.approx(7 / 4)
    assert both["rewards/margins"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (
            lambda: UnpairedBatch.from_lists([[1]], [[2]], [True]),
            ValueError,
            "rows should be of two prompts or more, .* but there is only one",
        ),
        (lambda: UnpairedBatch.from_lists([[1]], [[2], [3]], [True]), ValueError, "there are 1, 2 and 1"),
        (
            lambda: UnpairedBatch.from_lists([[1]] * 2, [[2]] * 2, [1, 0]),
            TypeError,
            "labels should be True or",
        ),
        (
            lambda: UnpairedBatch.from_lists([[1], [1]], [[2], [3]], [True, False]),
            ValueError,
            "rows should be of two prompts or more, .* but there is only one",
        ),
        (
            lambda: UnpairedBatch.from_lists([[1]], [[2]], [True], []),
            ValueError,
            "a KL completion for each prompt, but there are 0 for 1 prompts",
        ),
        (
            lambda: RankedBatch.from_lists([[1]], []),
            ValueError,
            "for each prompt, .* 0 lists for 1",
        ),
        (
            lambda: RankedBatch.from_lists([], []),
            ValueError,
            "should have at least one completion",
        ),
    ],
)
def test_bad_batches(call, kind: type[Exception], message: str):
    with pytest.raises(kind, match=message):
        call()


def test_data_of_another_kind_is_refused():
    policy, reference = models()
    lists = RankedBatch.from_lists(*lists_of_ids())
    rows = UnpairedBatch.from_lists(*rows_of_ids())
    for loss, data, message in (
        (
            KTO(),
            lists,
            "KTO learns from rows with a label, but it was given ranked lists: make a UnpairedBatch",
        ),
        (
            PlackettLuce(),
            lists.to_preference_batch(),
            "but it was given pairs: make a RankedBatch",
        ),
        (
            Sigmoid(),
            rows,
            "Sigmoid learns from pairs, but it was given rows with a label: make a PreferenceB",
        ),
    ):
        with pytest.raises(TypeError, match=message):
            DPO(policy, loss=loss, reference=reference)(data)
    with pytest.raises(TypeError, match="KTO learns from rows with a label, but it was given pairs"):
        x = torch.ones(1, 3, dtype=torch.long)
        DPO(policy, loss=KTO(), reference=reference)(x, x, x == 0)
    with pytest.raises(TypeError, match="give it alone"):
        DPO(policy, loss=KTO(), reference=reference)(rows, margins=torch.ones(5))
    for loss in (KTO(), PlackettLuce()):
        with pytest.raises(ValueError, match="ld_alpha compares the two sides of a pair, and"):
            DPO(policy, loss=loss, reference=reference, ld_alpha=0.5)
