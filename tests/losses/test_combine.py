"""Weighted sums of losses, functions as losses, and the columns of the data that act on them."""

from dataclasses import replace
from math import inf, log, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dpo_wrapper import IPO, SFT, Loss, PairLogProbs, Sigmoid
from dpo_wrapper.losses import (
    AOT,
    BCO,
    EXO,
    KTO,
    NCA,
    ORPO,
    SPPO,
    AOTUnpaired,
    APODown,
    APOZero,
    BetaDPO,
    CombinedLoss,
    DiscoPOP,
    PlackettLuce,
    as_weighted_losses,
)
from helpers.every_loss import EVERY_LOSS
from helpers.pair_log_probs import SETTINGS, example_pair, is_close, make_pairs, random_pairs

LN2 = log(2)


def pairs_at_the_reference() -> PairLogProbs:
    """Two pairs for which Sigmoid is ln 2 and SFT is 1 and 2."""
    return make_pairs([-2.0, -4.0], [-7.0, -8.0], [-2.0, -4.0], [-7.0, -8.0], [1, 3], [1, 1])


# weighted sums


def test_weighted_sum_by_hand():
    pairs = pairs_at_the_reference()
    values = CombinedLoss([(Sigmoid(), 0.8), (SFT(), 0.5)])(pairs)
    assert is_close(values, [0.8 * LN2 + 0.5, 0.8 * LN2 + 1.0])
    (slope,) = torch.autograd.grad(values.sum(), pairs.chosen)
    assert is_close(slope, [-0.8 * 0.1 / 2 - 0.25] * 2)


@given(
    random_pairs(),
    st.lists(st.tuples(st.sampled_from(EVERY_LOSS), st.floats(0.01, 5.0)), min_size=1, max_size=4),
)
@SETTINGS
def test_combined_loss_is_the_weighted_sum(pairs: PairLogProbs, terms: list[tuple[Loss, float]]):
    combined = CombinedLoss(terms)
    torch.testing.assert_close(combined(pairs), sum(weight * loss(pairs) for loss, weight in terms))
    for name in ("needs_reference", "is_per_pair", "is_deterministic"):
        values = [getattr(loss, name) for loss, _ in terms]
        assert getattr(combined, name) == (any(values) if name == "needs_reference" else all(values))


def test_dataset_type_is_that_of_the_losses():
    for loss, dataset_type in ((SFT(), "preference"), (PlackettLuce(), "ranked")):
        assert CombinedLoss(loss).dataset_type == dataset_type
    assert CombinedLoss(KTO()).dataset_type == "unpaired_preference"


def test_one_loss_or_a_list_becomes_weighted_losses():
    assert as_weighted_losses(SFT()) == ((SFT(), 1.0),)
    assert as_weighted_losses([(SFT(), 2), [Sigmoid(), 0.5]]) == ((SFT(), 2.0), (Sigmoid(), 0.5))
    assert as_weighted_losses(((SFT(), 2),)) == ((SFT(), 2.0),)
    assert as_weighted_losses(as_weighted_losses(SFT())) == as_weighted_losses(SFT())
    assert all(type(weight) is float for _, weight in as_weighted_losses([(SFT(), 2)]))


NO_LOSS = "loss should be one of dpo_wrapper.losses, a function or a list of (loss, weight), but it is"
NO_TERM = "a combined loss should be a list of (loss, weight), but it holds"
NO_WEIGHT = "the weight of SFT should be positive, but it is"


@pytest.mark.parametrize(
    "loss, error, message",
    [
        (None, TypeError, f"{NO_LOSS} None."),
        ([], TypeError, f"{NO_LOSS} []."),
        ("dpo", TypeError, f"{NO_LOSS} 'dpo'."),
        (Sigmoid, TypeError, f"{NO_LOSS} {Sigmoid!r}: write Sigmoid()."),
        ([(Sigmoid, 1.0)], TypeError, f"{NO_TERM} {(Sigmoid, 1.0)!r}."),
        ([SFT()], TypeError, f"{NO_TERM} SFT()."),
        ((SFT(), 0.5), TypeError, f"{NO_TERM} SFT()."),
        ([(0.5, SFT())], TypeError, f"{NO_TERM} (0.5, SFT())."),
        ([(SFT(),)], TypeError, f"{NO_TERM} (SFT(),)."),
        ([(SFT(), 0.0)], ValueError, f"{NO_WEIGHT} 0.0."),
        ([(SFT(), -1)], ValueError, f"{NO_WEIGHT} -1."),
        ([(SFT(), nan)], ValueError, f"{NO_WEIGHT} nan."),
        ([(SFT(), inf)], ValueError, f"{NO_WEIGHT} inf."),
        ([(SFT(), True)], ValueError, f"{NO_WEIGHT} True."),
        ([(SFT(), "1")], ValueError, f"{NO_WEIGHT} '1'."),
        ([(IPO(), 1.0), (SFT(), None)], ValueError, f"{NO_WEIGHT} None."),
        (
            [(KTO(), 1.0), (SFT(), 1.0)],
            TypeError,
            "losses of a sum should learn from data of one type, but KTO and SFT learn from different data: "
            "combine losses of one type.",
        ),
    ],
)
def test_bad_losses_are_refused(loss, error: type[Exception], message: str):
    with pytest.raises(error) as caught:
        as_weighted_losses(loss)
    assert str(caught.value) == message


# weights and margins of the data


def test_weights_of_pairs_by_hand():
    pairs = replace(pairs_at_the_reference(), weights=torch.tensor([0.5, 2.0], dtype=torch.float64))
    values = CombinedLoss([(Sigmoid(), 0.8), (SFT(), 0.5)])(pairs)
    assert is_close(values, [0.5 * (0.8 * LN2 + 0.5), 2 * (0.8 * LN2 + 1.0)])


NO_MARGIN = (IPO, EXO, DiscoPOP, NCA, BCO, SPPO, APOZero, APODown, SFT, ORPO, AOT, AOTUnpaired)


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=repr)
def test_margins_shift_the_logit_or_are_refused(loss: Loss):
    pair = replace(example_pair(), margins=torch.full((1,), 100.0).double())
    assert loss.has_margin != isinstance(loss, NO_MARGIN)
    if loss.has_margin:
        assert CombinedLoss(loss)(pair).isfinite() and not torch.equal(loss(pair), loss(example_pair()))
    else:
        with pytest.raises(ValueError, match=f"margins have no meaning for {type(loss).__name__}, which"):
            CombinedLoss(loss)(pair)


def test_one_loss_of_a_sum_may_leave_margins_alone():
    pair = replace(example_pair(), margins=torch.ones(1).double())
    assert CombinedLoss([(Sigmoid(), 1.0), (SFT(), 1.0)])(pair).isfinite()


@pytest.mark.parametrize("loss", [AOT(), AOTUnpaired(), BetaDPO()], ids=repr)
def test_losses_that_compare_pairs_refuse_weights(loss: Loss):
    pair = replace(example_pair(), weights=torch.ones(1).double())
    with pytest.raises(ValueError, match=f"weights of pairs have no meaning for {type(loss).__name__}"):
        CombinedLoss([(loss, 1.0), (SFT(), 1.0)])(pair)


def test_refusals_name_all_losses_that_are_meant():
    pair = example_pair()
    with pytest.raises(ValueError, match="for IPO and SFT, which have no logit to subtract them from: leave"):
        CombinedLoss([(IPO(), 1.0), (SFT(), 1.0)])(replace(pair, margins=torch.ones(1).double()))
    with pytest.raises(ValueError, match="for AOT and BetaDPO, which compare the pairs of a batch with one"):
        losses = [(AOT(), 1.0), (Sigmoid(), 1.0), (BetaDPO(), 1.0)]
        CombinedLoss(losses)(replace(pair, weights=torch.ones(1).double()))


# functions


def squared_difference(pairs: PairLogProbs) -> Tensor:
    return (pairs.chosen_logratio - pairs.rejected_logratio).square()


def mean_of_chosen(pairs: PairLogProbs) -> Tensor:
    return pairs.chosen.mean()


def test_a_function_is_a_loss():
    combined = CombinedLoss([(squared_difference, 0.5), (SFT(), 1.0)])
    assert is_close(combined(example_pair()), [18 + 4 / 2])
    assert as_weighted_losses(squared_difference)[0][1] == 1.0
    assert is_close(CombinedLoss(lambda pairs: pairs.chosen)(example_pair()), [-4.0])


def test_a_function_needs_a_reference_unless_it_says_otherwise():
    def chosen_nll(pairs: PairLogProbs) -> Tensor:
        return -pairs.chosen

    defaults = CombinedLoss(chosen_nll)
    assert defaults.needs_reference and defaults.is_per_pair and not defaults.is_deterministic
    attributes = {"needs_reference": False, "is_per_pair": False, "is_deterministic": True}
    vars(chosen_nll).update(attributes)
    own = CombinedLoss(chosen_nll)
    assert not own.needs_reference and not own.is_per_pair and own.is_deterministic


def test_a_module_is_called_but_not_registered():
    class ScaledChosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0).double())

        def forward(self, pairs: PairLogProbs) -> Tensor:
            return self.scale * pairs.chosen

    combined = CombinedLoss(ScaledChosen())
    assert is_close(combined(example_pair()), [-8.0])
    assert not list(combined.parameters()) and not combined.state_dict()


def test_a_function_that_reduces_is_refused():
    with pytest.raises(
        ValueError, match=r"one value per pair, .* \(1,\), but mean_of_chosen gave \(\): leave"
    ):
        CombinedLoss(mean_of_chosen)(example_pair())
