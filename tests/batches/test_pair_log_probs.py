"""Sums and weights that look at single tokens, by hand and at their limits."""

from dataclasses import replace
from math import exp, log

import pytest
import torch
from torch import Generator

from dpo_wrapper import DPO, SFT, PreferenceBatch, Sigmoid
from dpo_wrapper.batches.pair_log_probs import discounted_sums, wpo_weights
from dpo_wrapper.losses import AOT, CPO, KTO, AOTUnpaired, BetaDPO, SimPO
from helpers.batches import random_batch
from helpers.marks import mark_slow_except
from helpers.models import ZOO


def batch(*lengths: tuple[int, int]) -> PreferenceBatch:
    """Pairs with one prompt token and these numbers of scored tokens."""
    width = 1 + max(map(max, lengths))
    sides = [torch.arange(width) < 1 + torch.tensor(side)[:, None] for side in zip(*lengths, strict=True)]
    seqs = tuple(torch.randint(37, side.shape) for side in sides)
    prompts = tuple((torch.arange(width) < 1).expand_as(side) for side in sides)
    return PreferenceBatch.from_padded(seqs, prompts, tuple(sides))


def test_discounted_sums_by_hand():
    # chosen has 3 tokens and 1, rejected 2 and 4; scores in the order of the sequences
    given = batch((3, 2), (1, 4))
    scores = torch.tensor([-1.0, -2.0, -4.0, -8.0, -1.0, -2.0, -3.0, -5.0, -7.0, -9.0], requires_grad=True)
    chosen, rejected = discounted_sums(given.sequences, given.pair_index, scores, 0.5)
    assert chosen.tolist() == [-1 - 2 - 4 / 2, -8.0] and rejected.tolist() == [-3.0, -3 - (5 + 7 + 9) / 2]
    (slope,) = torch.autograd.grad(chosen.sum() + rejected.sum(), scores)
    assert slope.tolist() == [1, 1, 0.5, 1, 1, 1, 1, 0.5, 0.5, 0.5]
    assert discounted_sums(given.sequences, given.pair_index, scores, 0.0)[1].tolist() == [-3.0, -3.0]
    whole = given.sequences.sum_per_sequence(scores)
    plain = discounted_sums(given.sequences, given.pair_index, scores, 1.0)
    for side, sums in zip(given.pair_index.T, plain, strict=True):
        assert torch.equal(sums, whole[side])


def test_sequence_of_two_pairs_has_two_sums():
    given = batch((3, 1), (2, 2))
    both = PreferenceBatch(given.sequences, torch.tensor([[0, 2], [0, 1]]))
    scores = -torch.arange(1.0, 9.0)
    assert discounted_sums(both.sequences, both.pair_index, scores, 0.0)[0].tolist() == [-1.0, -3.0]


def call(dpo: DPO, seed: int = 4):
    case = random_batch(Generator().manual_seed(seed), b=5)
    return dpo(case.preferred_seq, case.unpreferred_seq, case.prompt_masks, case.seq_masks)


def made(loss, **kwargs) -> DPO:
    policy, reference = ZOO["xt-rotary"](0).double(), ZOO["xt-rotary"](1).double()
    return DPO(policy, loss=loss, reference=reference, **kwargs)


LOSSES_WITH_ALPHA = [Sigmoid(0.3), SimPO(), CPO(), [(Sigmoid(0.3), 1.0), (SFT(), 1.0)]]


@pytest.mark.parametrize(
    "loss", mark_slow_except([SimPO(), LOSSES_WITH_ALPHA[-1]], LOSSES_WITH_ALPHA), ids=str
)
def test_alpha_in_dpo(loss):
    plain, none, half = (call(made(loss, ld_alpha=alpha)) for alpha in (1.0, 0.0, 0.5))
    assert len({plain.item(), none.item(), half.item()}) == 3
    near = call(made(loss, ld_alpha=1 - 1e-9))
    torch.testing.assert_close(near, plain, rtol=1e-7, atol=1e-7)


def test_alpha_leaves_likelihoods_whole_and_trees_as_they_are():
    # likelihood terms stay whole
    assert torch.allclose(call(made(SFT(), ld_alpha=0.0)), call(made(SFT())))
    for share in (True, False):
        torch.testing.assert_close(
            call(made(Sigmoid(), ld_alpha=0.2, share_prefix=share)),
            call(made(Sigmoid(), ld_alpha=0.2)),
            rtol=1e-6,
            atol=1e-6,
        )


def test_bad_alpha():
    for alpha in (-0.1, 1.1, "1", None):
        with pytest.raises(ValueError, match=f"ld_alpha should be a number from 0 to 1, but it is {alpha!r}"):
            made(Sigmoid(), ld_alpha=alpha)
    dpo, ids = made(Sigmoid(), ld_alpha=0.5), torch.ones(1, 4, dtype=torch.long)
    sums = (torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="ref_log_probs are sums of all tokens"):
        dpo(ids, ids, ids == 0, ref_log_probs=sums)


def test_wpo_weights_by_hand():
    # means of log p - log Σ p²: chosen (ln 2 + ln 8) / 2 = ln 4, rejected -ln 2; their product 4 / 2
    given = batch((2, 1))
    scores = torch.tensor([log(0.5), log(0.25), log(0.125)])
    squares = torch.tensor([log(0.25), log(1 / 32), log(0.25)])

    def weights(scores, squares):
        policy = given.sequences.log_probs(scores, {"log_sum_p2": squares})
        return wpo_weights(given.sequences, given.pair_index, policy).tolist()

    assert weights(scores, squares) == pytest.approx([2.0])
    # where the policy is certain of what is written, the weight is 1
    assert weights(torch.zeros(3), torch.zeros(3)) == [1.0]
    assert weights(torch.full((3,), -1e4), torch.zeros(3)) == [exp(-2e4)]


WPO_CASES = [
    ("xt-rotary", True, "eager"),
    ("xt-rotary", True, "chunked"),
    ("xt-rotary", False, "auto"),
    ("plain-tied", "auto", "auto"),  # whose logits are computed whole
    ("xt-mixture", "auto", "auto"),
]


@pytest.mark.parametrize("name, share, impl", WPO_CASES)
def test_wpo_in_dpo(name, share, impl):
    """Against the formula, written out over each sequence's own log-softmax."""
    policy, reference = ZOO[name](0).double(), ZOO[name](1).double()
    options = {"reference": reference, "share_prefix": share, "log_prob_impl": impl}
    dpo = DPO(policy, loss=Sigmoid(0.3), wpo=True, **options)
    case = random_batch(Generator().manual_seed(4), b=5)
    sides = ((case.preferred_seq, case.unpreferred_seq), case.prompt_masks, case.seq_masks)
    given = PreferenceBatch.from_padded(*sides, weights=torch.tensor([1.0, 0.5, 2.0, 1.0, 3.0]))
    sequences = given.sequences
    logits = policy.eval()(sequences.ids)
    every = getattr(logits, "logits", logits).log_softmax(dim=-1)
    weights = []
    for k in range(len(sequences.ids)):
        mine = sequences.row == k
        p = every[k, sequences.source[mine]]
        scores = p.gather(-1, sequences.target[mine, None])[:, 0]
        weights.append((scores - p.exp().square().sum(dim=-1).log()).mean().exp().detach())
    weights = torch.stack(weights)[given.pair_index].prod(dim=-1).nan_to_num(nan=1.0)
    plain = DPO(policy, loss=Sigmoid(0.3), **options)
    expected = plain(replace(given, weights=given.weights * weights))
    found, metrics = dpo(given, return_metrics=True)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(metrics["loss"], found.detach())
    assert abs(found - plain(given)) > 1e-3
    gradients = [torch.autograd.grad(loss, list(policy.parameters())) for loss in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_wpo_is_refused_where_it_cannot_act():
    for loss in (AOT(), BetaDPO(), [(Sigmoid(), 1.0), (AOTUnpaired(), 1.0)]):
        with pytest.raises(ValueError, match=r"weights of pairs have no meaning for (AOT|BetaDPO)"):
            made(loss, wpo=True)
    with pytest.raises(ValueError, match="wpo weights pairs, and KTO learns from other data"):
        made(KTO(), wpo=True)
    with pytest.raises(TypeError, match="wpo should be True or False, but it is 1"):
        made(Sigmoid(), wpo=1)
