"""The loss that `DPO` passes to the gather: its predicted gradients are right, and nothing else changes."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from dpo_wrapper import DPO, PairLogProbs, PreferenceBatch, RankedBatch, Sigmoid
from dpo_wrapper.batches import ScoredSequences, SFTBatch
from dpo_wrapper.log_probs import fused_backward
from dpo_wrapper.losses import ORPO, SFT, APODown, BetaDPO, DiscoPOP, PlackettLuce
from dpo_wrapper.scoring import token_log_probs as scoring
from dpo_wrapper.scoring.fused_loss import connected_components
from dpo_wrapper.training.stages import SFTModule
from helpers.batches import random_batch
from helpers.every_loss import EVERY_LOSS_BUT_MOST_SLOW, loss_id
from helpers.log_prob_inputs import tile_size
from helpers.models import ZOO
from helpers.ranked_batches import lists_in_parts, lists_of_ids, rows_in_parts


class Watch:
    """How many parts there were each time, and how often what came back was not as foretold."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
        self.parts: list[int] = []
        self.wrong = 0
        split, again = fused_backward.FusedLoss.split, fused_backward.gradients_from_saved

        def parts(*args) -> list:
            found = split(*args)
            self.parts.append(len(found))
            return found

        def gradients_from_saved(*args):
            self.wrong += 1
            return again(*args)

        monkeypatch.setattr(fused_backward.FusedLoss, "split", parts)
        monkeypatch.setattr(fused_backward, "gradients_from_saved", gradients_from_saved)
        monkeypatch.setattr(fused_backward, "max_chunk_tokens", lambda *_: tokens)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch, tokens=3)


def compared(dpo: torch.nn.Module, loss_of: Callable[[], Tensor], factor: float = 1.0) -> None:
    """The loss and its gradients, not foretold, in tiles of the usual size, and foretold in small ones."""
    found, before = [], {name: buffer.clone() for name, buffer in dpo.named_buffers()}
    for foretells, tiles in ((False, nullcontext()), (True, tile_size(2, 16))):
        dpo.train(foretells)
        for name, buffer in dpo.named_buffers():  # a running gap is where it was
            buffer.copy_(before[name])
        dpo.zero_grad(set_to_none=True)
        with tiles:
            loss = loss_of()
            (loss * factor).backward()
        gradients = {name: p.grad for name, p in dpo.named_parameters() if p.grad is not None}
        assert gradients
        found.append((loss.detach(), gradients))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def models(name: str) -> tuple:
    return ZOO[name](0).double(), ZOO[name](1).double()


def args_of(case) -> tuple:
    return case.preferred_seq, case.unpreferred_seq, case.prompt_masks, case.seq_masks


@pytest.mark.pitfall(15)
@pytest.mark.usefixtures("one_layer")
@pytest.mark.parametrize("share", (True, pytest.param(False, marks=pytest.mark.slow)))
@pytest.mark.parametrize("loss", EVERY_LOSS_BUT_MOST_SLOW)
def test_every_loss_comes_true(loss, share: bool, watch: Watch):
    policy, reference = models("xt-rotary")
    loss = replace(loss)  # BetaDPO with statistics of its own
    dpo = DPO(policy, loss=loss, reference=reference if loss.needs_reference else "none", share_prefix=share)
    case = random_batch(Generator().manual_seed(3), b=4)
    for _ in range(2):  # the second time a running gap has moved
        compared(dpo, lambda: dpo(*args_of(case)), factor=0.25)
    assert not watch.wrong and len(watch.parts) == 2
    assert all(n == 1 for n in watch.parts) if not loss.is_per_pair else min(watch.parts) > 1


@pytest.mark.parametrize("name", ["xt-tied", "hf-llama", "hf-llama-tied", "hf-gpt2", "hf-gemma2"])
def test_models_whose_head_is_applied_to_scored_tokens(name: str, watch: Watch):
    policy, reference = models(name)
    dpo = DPO(policy, reference=reference)
    case = random_batch(Generator().manual_seed(5), b=4)
    compared(dpo, lambda: dpo(*args_of(case)))
    assert min(watch.parts) > 1 and not watch.wrong


@pytest.mark.parametrize("name", ["plain-transformer", "xt-mixture"])
def test_models_that_hand_out_logits_alone(name: str, watch: Watch):
    policy, reference = models(name)
    dpo = DPO(policy, reference=reference)
    case = random_batch(Generator().manual_seed(5), b=4)
    compared(dpo, lambda: dpo(*args_of(case)))
    assert not watch.parts


def squared(pairs: PairLogProbs) -> Tensor:
    return (pairs.chosen_logratio - pairs.rejected_logratio).square()


squared.is_deterministic = True  # type: ignore[attr-defined]
OPTIONS = {
    "several losses": {"loss": [(Sigmoid(0.3), 1.0), (SFT(), 0.5), (ORPO(), 0.5)]},
    "LD-DPO": {"ld_alpha": 0.3},
    "WPO": {"wpo": True},  # foretells nothing
    "a user's": {"loss": squared},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_come_true(name: str, watch: Watch):
    policy, reference = models("hf-llama")
    dpo = DPO(policy, reference=reference, **OPTIONS[name])
    case = random_batch(Generator().manual_seed(3), b=5, odd=0.0)
    columns = {"pair_weights": torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0], dtype=torch.float64)}
    compared(dpo, lambda: dpo(*args_of(case), **columns))
    assert not watch.wrong and (not watch.parts if name == "WPO" else min(watch.parts) > 1)


def test_a_users_loss_that_mixes_pairs_is_computed_again(watch: Watch):
    def mixing(pairs: PairLogProbs) -> Tensor:
        gap = pairs.chosen_logratio - pairs.rejected_logratio
        return (gap - gap.mean()).square()

    mixing.is_deterministic = True  # type: ignore[attr-defined]
    case = random_batch(Generator().manual_seed(3), b=4, odd=0.0)
    for is_per_pair in (True, False):
        mixing.is_per_pair = is_per_pair  # type: ignore[attr-defined]
        policy, reference = models("xt-rotary")
        dpo = DPO(policy, reference=reference, loss=mixing)
        compared(dpo, lambda dpo=dpo: dpo(*args_of(case)))
        assert watch.wrong == is_per_pair and (watch.parts[-1] > 1) == is_per_pair
        watch.wrong = 0


def test_a_users_loss_is_called_once_unless_it_says_that_it_is_deterministic(watch: Watch):
    seen = []

    def remembers(pairs: PairLogProbs) -> Tensor:
        seen.append(pairs.chosen.detach())
        return squared(pairs)

    case = random_batch(Generator().manual_seed(3), b=4, odd=0.0)
    for is_deterministic in (False, True):
        remembers.is_deterministic = is_deterministic  # type: ignore[attr-defined]
        policy, reference = models("xt-rotary")
        seen.clear()
        DPO(policy, reference=reference, loss=remembers)(*args_of(case)).backward()
        assert (len(seen) > 1) == is_deterministic == bool(watch.parts)
        # what is not known yet is -1 per token, and so a log-prob like any other
        assert all((scores < 0).all() for scores in seen)


def test_a_loss_that_draws_is_asked_once(watch: Watch):
    policy, reference = models("xt-rotary")
    dpo = DPO(policy, reference=reference, loss=BetaDPO(drop=0.5))
    statistics = dpo.loss.first_loss.statistics  # type: ignore[attr-defined]
    statistics.std.fill_(5.0)
    case = random_batch(Generator().manual_seed(3), b=4, odd=0.0)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        dpo.eval() if found else dpo.train()
        statistics.std.fill_(5.0), statistics.mean.zero_()
        found.append((dpo(*args_of(case)), torch.rand(1)))
    torch.testing.assert_close(*found)
    assert not watch.parts


def test_under_autocast_the_loss_is_told_as_it_will_be(watch: Watch):
    layer = torch.nn.Linear(1, 1)

    def learned(pairs: PairLogProbs) -> Tensor:
        return layer((pairs.chosen - pairs.rejected)[:, None])[:, 0].square().float()

    learned.is_deterministic = True  # type: ignore[attr-defined]
    policy, reference = ZOO["hf-llama"](0), ZOO["hf-llama"](1)
    dpo = DPO(policy, reference=reference, loss=learned)
    case = random_batch(Generator().manual_seed(3), b=4, odd=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = dpo(*args_of(case))
    loss.backward()
    assert watch.parts and not watch.wrong and layer.weight.grad.any()


@pytest.mark.parametrize("loss", (APODown(), DiscoPOP()), ids=loss_id)
def test_gradients_that_cancel_come_true(loss, watch: Watch):
    case = random_batch(Generator().manual_seed(0), b=24, odd=0.0)
    for seed in range(3):
        dpo = DPO(ZOO["xt-rotary"](seed), loss=loss, reference=ZOO["xt-rotary"](seed + 9))
        for factor in (1 / 3, 1 / 7, 0.1):
            (dpo(*args_of(case)) * factor).backward()
    assert len(watch.parts) == 9 and not watch.wrong


def test_what_is_made_of_a_loss_comes_true_if_it_is_a_multiple(watch: Watch):
    policy, reference = models("xt-rotary")
    dpo = DPO(policy, reference=reference)
    case = random_batch(Generator().manual_seed(3), b=4)
    compared(dpo, lambda: dpo(*args_of(case)).exp())
    assert not watch.wrong


@pytest.mark.parametrize("share", (True, False))
@pytest.mark.parametrize("parts", (lists_in_parts, rows_in_parts))
def test_lists_and_rows(parts: Callable[[], tuple], share: bool, watch: Watch):
    loss, whole, _ = parts()
    policy, reference = models("xt-rotary")
    dpo = DPO(policy, loss=loss, reference=reference, share_prefix=share)
    compared(dpo, lambda: dpo(whole))
    assert not watch.wrong and min(watch.parts) > 1


@pytest.mark.parametrize("share", (True, False))
@pytest.mark.parametrize("which", ("all", "best"))
def test_pairs_that_share_sequences_meet(which: str, share: bool, watch: Watch):
    policy, reference = models("xt-rotary")
    batch = RankedBatch.from_lists(*lists_of_ids()).to_preference_batch(which)
    dpo = DPO(policy, reference=reference, share_prefix=share)
    compared(dpo, lambda: dpo(batch))
    assert not watch.wrong and watch.parts == [3]  # one for each list


def test_pairs_that_are_scored_together_meet(watch: Watch):
    policy, reference = models("xt-rotary")
    # the completions begin alike, so that tokens of both pairs are scored once
    prompts, chosen, rejected = [[1, 2]] * 2 + [[9]], [[3, 4, 5], [3, 4, 6], [7]], [[3, 7], [8], [3, 4, 9]]
    batch = PreferenceBatch.from_lists(prompts, chosen, rejected)
    for share, parts in ((True, 2), (False, 3)):
        dpo = DPO(policy, reference=reference, share_prefix=share)
        compared(dpo, lambda dpo=dpo: dpo(batch))
        assert not watch.wrong and watch.parts.pop() == parts


def test_supervised_warm_up(watch: Watch):
    module = SFTModule(ZOO["hf-llama"](0).double())
    sequences = ScoredSequences.from_lists([()] * 3, [[1, 2, 3], [4, 5, 6, 7], [1, 2, 8, 9]])
    compared(module, lambda: module(SFTBatch(sequences, step_denominator=17)))
    assert not watch.wrong and min(watch.parts) > 1


def test_nothing_is_asked_without_gradients_or_in_evaluation_or_of_a_frozen_head(
    monkeypatch: pytest.MonkeyPatch,
):
    asked, merge = [], scoring.fused_loss_of_entries

    def watched(*args):
        asked.append(args)
        return merge(*args)

    monkeypatch.setattr(scoring, "fused_loss_of_entries", watched)
    policy, reference = models("xt-rotary")
    dpo = DPO(policy, reference=reference)
    case = random_batch(Generator().manual_seed(3), b=4)
    with torch.no_grad():
        dpo(*args_of(case))
    dpo.eval()
    dpo(*args_of(case))
    dpo.train()
    policy.to_logits.weight.requires_grad_(False)
    dpo(*args_of(case))
    assert not asked
    policy.to_logits.weight.requires_grad_()
    dpo(*args_of(case))
    assert len(asked) == 1


def test_no_valid_pair(watch: Watch):
    policy, reference = models("xt-rotary")
    dpo = DPO(policy, reference=reference)
    one = torch.tensor([[3, 4, 5]])
    loss = dpo(one, one + 1, torch.ones_like(one, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    half = (torch.tensor([[True, True, True]]), torch.tensor([[True, False, False]]))
    loss = dpo(one, one + 1, half)  # a side is scored, but the pair does not count
    loss.backward()
    assert loss == 0 and not watch.wrong
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2), max_size=12))
    )
)
@settings(max_examples=200, derandomize=True)
def test_groups_are_what_links_connect(drawn: tuple[int, list[tuple[int, int]]]):
    count, links = drawn
    found = connected_components(torch.tensor(links, dtype=torch.long).reshape(-1, 2), count).tolist()
    reached = [{k} for k in range(count)]  # by the slow way: until nothing is new
    for _ in range(count):
        for one, other in links:
            joined = reached[one] | reached[other]
            for k in joined:
                reached[k] = joined | reached[k]
    for one in range(count):
        for other in range(count):
            assert (found[one] == found[other]) == (other in reached[one])


def test_long_chains():
    links = torch.tensor(list(pairwise(range(3000))))
    assert connected_components(links, 3000).tolist() == [0] * 3000
    assert connected_components(links.flip(0), 3000).tolist() == [0] * 3000


def test_plackett_luce_groups_the_tokens_of_a_list(watch: Watch):
    prompts, completions = lists_of_ids()
    batch = RankedBatch.from_lists(prompts, completions)
    # two to a list, and the third rank is empty in one of them
    assert sorted(
        set(connected_components(batch.linked_sequences, len(batch.sequences.length)).tolist())
    ) == [0, 3, 5]
    assert batch.linked_sequences.max() < len(batch.sequences.length)
    policy, reference = models("xt-rotary")
    dpo = DPO(policy, loss=PlackettLuce(), reference=reference)
    compared(dpo, lambda: dpo(batch))
    assert watch.parts == [3]
