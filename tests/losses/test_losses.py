"""Losses against numbers derived by hand, at their limits and extremes; and the text they are read from."""

from dataclasses import fields, replace
from functools import partial
from itertools import product
from math import exp, inf, log, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dpo_wrapper import IPO, SFT, Loss, PairLogProbs, PreferenceBatch, Sigmoid, SigmoidNorm, SimPO, dpo_loss
from dpo_wrapper.batches.pair_log_probs import pair_log_probs
from dpo_wrapper.losses import combined, needs_reference, weighted
from helpers.pair_log_probs import FAST, grads, is_close, pairs, sigmoid, some_pairs

LN2 = log(2)
WITH_REFERENCE = (Sigmoid(), Sigmoid(0.5, 0.2), SigmoidNorm(), IPO())
WITHOUT_REFERENCE = (SimPO(), SFT())
ALL = WITH_REFERENCE + WITHOUT_REFERENCE


# numbers by hand
#
# one pair:  p_w = -4, p_l = -9, r_w = -6, r_l = -5, n_w = 2, n_l = 4, so a = 2, b = -4


ONE = partial(pairs, [-4.0], [-9.0], [-6.0], [-5.0], [2], [4])


def test_sigmoid_by_hand():
    # beta (a - b) = (ln 3 / 6) 6 = ln 3: sigma = 3/4
    assert is_close(Sigmoid(beta=log(3) / 6)(ONE()), [log(4 / 3)])
    # d/da = -beta (1 - 3/4), d/db = +beta (1 - 3/4)
    chosen, rejected = grads(Sigmoid(beta=log(3) / 6), ONE())
    assert is_close(chosen, [-log(3) / 24]) and is_close(rejected, [log(3) / 24])
    # with smoothing 1/4: 3/4 ln(4/3) + 1/4 ln 4
    assert is_close(Sigmoid(log(3) / 6, label_smoothing=0.25)(ONE()), [0.75 * log(4 / 3) + 0.25 * log(4)])
    # and there it is least: sigma = 3/4 = 1 - smoothing
    chosen, rejected = grads(Sigmoid(log(3) / 6, 0.25), ONE())
    assert is_close(chosen, [0.0]) and is_close(rejected, [0.0])


def test_sigmoid_without_a_reference_by_hand():
    # p_w - p_l = 5; beta 5 = ln 7: sigma = 7/8
    assert is_close(Sigmoid(log(7) / 5)(pairs([-4.0], [-9.0])), [log(8 / 7)])


def test_sigmoid_norm_by_hand():
    # a / 2 - b / 4 = 1 + 1 = 2; beta 2 = ln 3: sigma = 3/4
    assert is_close(SigmoidNorm(beta=log(3) / 2)(ONE()), [log(4 / 3)])
    chosen, rejected = grads(SigmoidNorm(beta=log(3) / 2), ONE())
    assert is_close(chosen, [-log(3) / 2 / 4 / 2]) and is_close(rejected, [log(3) / 2 / 4 / 4])


@pytest.mark.pitfall(16)
def test_ipo_by_hand():
    # (a / 2 - b / 4 - 1 / (2 beta))^2 = (2 - 1/2)^2
    assert is_close(IPO(beta=1.0)(ONE()), [9 / 4])
    # 2 (3/2) / 2 and -2 (3/2) / 4
    chosen, rejected = grads(IPO(beta=1.0), ONE())
    assert is_close(chosen, [3 / 2]) and is_close(rejected, [-3 / 4])
    # the margin it aims at is 1 / (2 beta) = 2
    assert is_close(IPO(beta=0.25)(ONE()), [0.0])
    # over sums it would be (6 - 2)^2 (pitfall 16)


@pytest.mark.pitfall(16)
def test_simpo_by_hand():
    # p_w / 2 - p_l / 4 = -2 + 9/4 = 1/4; beta/4 - gamma = 4 ln 3 / 4 - ln 3 / 2 = ln 3 / 2
    loss = SimPO(beta=4 * log(3), gamma=log(3) / 2)
    assert is_close(loss(ONE()), [log(1 + 3**-0.5)])
    # -beta (1 - sigma) / n_w, with 1 - sigma = 1 / (1 + sqrt 3)
    chosen, rejected = grads(loss, ONE())
    slope = 4 * log(3) / (1 + 3**0.5)
    assert is_close(chosen, [-slope / 2]) and is_close(rejected, [slope / 4])


def test_sft_by_hand():
    # two pairs with 1 and 3 scored tokens, log-probs -2 and -4: mean over tokens -(-2 - 4) / 4 = 3/2
    given = pairs([-2.0, -4.0], [-7.0, -8.0], n_w=[1, 3], n_l=[9, 9])
    assert is_close(SFT()(given), [1.0, 2.0]) and is_close(SFT()(given).mean(), 1.5)
    chosen, rejected = grads(SFT(), given)
    assert is_close(chosen, [-0.5, -0.5]) and is_close(rejected, [0.0, 0.0])


def test_defaults():
    # losses.md: beta 0.1, SimPO 2.0 and 0.5. All at a = 2, b = -4 as above
    assert is_close(Sigmoid()(ONE()), [-log(sigmoid(0.6))])
    assert is_close(SigmoidNorm()(ONE()), [-log(sigmoid(0.2))])
    assert is_close(IPO()(ONE()), [9.0])  # (2 - 5)^2
    assert is_close(SimPO()(ONE()), [LN2])  # 2/4 - 1/2 = 0
    assert (Sigmoid().label_smoothing, SimPO().beta, SimPO().gamma) == (0.0, 2.0, 0.5)


# limits and relations


@given(some_pairs(), st.floats(1e-3, 10.0))
@FAST
def test_gradient_signs(given: PairLogProbs, beta: float):
    # chosen is pulled up and rejected pushed down, always; IPO and smoothing turn round past their optimum
    for loss in (Sigmoid(beta), SigmoidNorm(beta), SimPO(beta), SFT()):
        chosen, rejected = grads(loss, given)
        assert (chosen <= 0).all() and (rejected >= 0).all()

    margin = given.chosen_logratio / given.chosen_length - given.rejected_logratio / given.rejected_length
    chosen, rejected = grads(IPO(beta), given)
    for slope, sign in ((chosen, 1), (rejected, -1)):
        assert torch.equal(slope.sign(), sign * (margin - 1 / (2 * beta)).sign())


@given(some_pairs(), st.floats(1e-3, 10.0))
@FAST
def test_limits(given: PairLogProbs, beta: float):
    assert torch.equal(Sigmoid(beta, 0.0)(given), Sigmoid(beta)(given))
    # smoothing is the mean of the loss over labels that are wrong with that probability
    turned = replace(
        given,
        chosen=given.rejected,
        rejected=given.chosen,
        ref_chosen=given.ref_rejected,
        ref_rejected=given.ref_chosen,
    )
    mean = 0.7 * Sigmoid(beta)(given) + 0.3 * Sigmoid(beta)(turned)
    torch.testing.assert_close(Sigmoid(beta, 0.3)(given), mean)

    # gamma 0 and a reference of zeros
    zeros = torch.zeros_like(given.chosen)
    zero_reference = replace(given, ref_chosen=zeros, ref_rejected=zeros)
    assert torch.equal(SimPO(beta, gamma=0.0)(given), SigmoidNorm(beta)(zero_reference))
    # where all lengths are n, per token is the same as beta / n
    eight = torch.full_like(given.chosen_length, 8)
    same = replace(given, chosen_length=eight, rejected_length=eight)
    torch.testing.assert_close(SigmoidNorm(8 * beta)(same), Sigmoid(beta)(same))


@given(some_pairs())
@FAST
def test_at_the_reference(given: PairLogProbs):
    start = replace(given, ref_chosen=given.chosen.detach(), ref_rejected=given.rejected.detach())
    for loss in (Sigmoid(0.3), Sigmoid(0.3, 0.2), SigmoidNorm(0.3)):
        assert (loss(start) - LN2).abs().max() < 1e-15  # the log of 2 itself
    assert torch.equal(IPO(0.5)(start), torch.ones_like(given.chosen))  # (0 - 1)^2
    sides = [given.chosen.tolist(), given.rejected.tolist()]
    single = pairs(*sides, *sides, dtype=torch.float32)
    assert (Sigmoid()(single) == torch.tensor(LN2)).all()


@given(some_pairs(least=2), st.sampled_from(ALL))
@FAST
def test_each_pair_is_on_its_own(given: PairLogProbs, loss: Loss):
    # row k of the result depends on row k alone: no reduction, no broadcasting
    whole = loss(given)
    assert whole.shape == given.chosen.shape
    for k in range(len(whole)):
        row = {name: x[k : k + 1] for name, x in vars(given).items() if x is not None and x.ndim}
        assert torch.allclose(loss(replace(given, **row)), whole[k : k + 1])


@given(some_pairs(), st.sampled_from(ALL))
@FAST
def test_references_are_ignored_where_they_are_not_needed(given: PairLogProbs, loss: Loss):
    assert loss.needs_reference == (loss in WITH_REFERENCE)
    bare = replace(given, ref_chosen=None, ref_rejected=None)
    zeros = torch.zeros_like(given.chosen)
    zero_reference = replace(given, ref_chosen=zeros, ref_rejected=zeros)
    assert torch.equal(loss(bare), loss(zero_reference))
    if not loss.needs_reference:
        assert torch.equal(loss(bare), loss(given))


def test_logratios():
    given = pairs([-4.0], [-9.0], [-6.0], [-5.0])
    assert given.chosen_logratio.tolist() == [2.0] and given.rejected_logratio.tolist() == [-4.0]
    given = pairs([-4.0], [-9.0])
    assert given.chosen_logratio is given.chosen and given.rejected_logratio is given.rejected


def test_no_pairs():
    for loss in ALL:
        assert loss(pairs([], [], [], [])).shape == (0,)


# extremes

EXTREMES = (0.0, -1e-30, -1e-8, -1.0, -88.8, -104.0, -745.2, -1e4)


@pytest.mark.pitfall(17)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize(
    "loss", [*ALL, Sigmoid(10.0), Sigmoid(1.0, 0.49), SigmoidNorm(10.0), IPO(10.0), SimPO(50.0, 9.0)]
)
def test_finite_at_the_extremes(loss: Loss, dtype: torch.dtype):
    columns = map(list, zip(*product(EXTREMES, repeat=4), strict=True))
    chosen, rejected, ref_chosen, ref_rejected = columns
    n_w, n_l = ([1 + (k * step) % 7 for k in range(len(chosen))] for step in (3, 5))
    given = pairs(chosen, rejected, ref_chosen, ref_rejected, n_w, n_l, dtype)
    values = loss(given)
    assert values.dtype == dtype and values.isfinite().all() and (values >= 0).all()
    assert all(slope.isfinite().all() for slope in grads(loss, given))


def test_far_out_values_by_hand():
    # -log sigma(x) is -x for x far below zero and e^-x far above, which is 0 in the end
    given = pairs([-1e4, 0.0], [0.0, -1e4], dtype=torch.float32)
    assert Sigmoid(1.0)(given).tolist() == [1e4, 0.0]
    chosen, rejected = grads(Sigmoid(1.0), given)
    assert chosen.tolist() == [-1.0, 0.0] and rejected.tolist() == [1.0, 0.0]
    # but not before: float32's 1 + e^-50 is 1, and its log would be 0
    close = pairs([0.0], [-50.0], dtype=torch.float32)
    assert Sigmoid(1.0)(close).item() == pytest.approx(exp(-50), rel=1e-5)
    assert grads(Sigmoid(1.0), close)[0].item() == pytest.approx(-exp(-50), rel=1e-5)


# combinations


def test_combined_by_hand():
    # 0.8 ln 2 (p = r) + 0.5 (1 + 2): SFT's as above
    given = pairs([-2.0, -4.0], [-7.0, -8.0], [-2.0, -4.0], [-7.0, -8.0], [1, 3], [1, 1])
    values = combined(weighted([(Sigmoid(), 0.8), (SFT(), 0.5)]), given)
    assert is_close(values, [0.8 * LN2 + 0.5, 0.8 * LN2 + 1.0])
    slope = torch.autograd.grad(values.sum(), given.chosen)[0]
    assert is_close(slope, [-0.8 * 0.1 / 2 - 0.25] * 2)


@given(some_pairs(), st.lists(st.tuples(st.sampled_from(ALL), st.floats(0.01, 5.0)), min_size=1, max_size=4))
@FAST
def test_combined_is_the_weighted_sum(given: PairLogProbs, terms: list[tuple[Loss, float]]):
    expected = sum(weight * loss(given) for loss, weight in terms)
    torch.testing.assert_close(combined(weighted(terms), given), expected)
    assert needs_reference(weighted(terms)) == any(loss.needs_reference for loss, _ in terms)


def test_weighted():
    assert weighted(SFT()) == ((SFT(), 1.0),)
    assert weighted([(SFT(), 2), [Sigmoid(), 0.5]]) == ((SFT(), 2.0), (Sigmoid(), 0.5))
    assert weighted(((SFT(), 2),)) == ((SFT(), 2.0),)
    assert weighted(weighted(SFT())) == weighted(SFT())
    assert all(type(weight) is float for _, weight in weighted([(SFT(), 2)]))


NO_LOSS = "loss should be one of dpo_wrapper.losses, a function or a list of (loss, weight), but it is"
NO_TERM = "a combined loss should be a list of (loss, weight), but it holds"
NO_WEIGHT = "the weight of SFT should be positive, but it is"


@pytest.mark.parametrize(
    "loss, kind, message",
    [
        (None, TypeError, f"{NO_LOSS} None."),
        ([], TypeError, f"{NO_LOSS} []."),
        ("dpo", TypeError, f"{NO_LOSS} 'dpo'."),
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
    ],
)
def test_weighted_refuses(loss, kind: type[Exception], message: str):
    with pytest.raises(kind) as caught:
        weighted(loss)
    assert str(caught.value) == message


def test_a_class_is_no_loss():
    for loss in (Sigmoid, [(Sigmoid, 1.0)]):
        with pytest.raises(TypeError, match=r"\(loss, weight\), but it .*Sigmoid"):
            weighted(loss)


# options

BETAS = product((Sigmoid, SigmoidNorm, IPO, SimPO), ("beta",), (0, 0.0, -0.1, nan, inf, -inf))
SMOOTHINGS = product((Sigmoid,), ("label_smoothing",), (-0.1, 0.5, 1, nan, inf, -inf))
GAMMAS = product((SimPO,), ("gamma",), (-0.5, nan, inf, -inf))
REQUIRED = {
    "beta": "should be positive",
    "label_smoothing": "should be in [0, 0.5)",
    "gamma": "should not be negative",
}


@pytest.mark.parametrize("kind, name, value", [*BETAS, *SMOOTHINGS, *GAMMAS])
def test_bad_options(kind: type[Loss], name: str, value: float):
    with pytest.raises(ValueError) as caught:
        kind(**{name: value})
    assert str(caught.value) == f"{kind.__name__}: {name} {REQUIRED[name]}, but it is {value}."


@pytest.mark.parametrize("value", ["0.1", None, [0.1], True])
@pytest.mark.parametrize("kind, name", [(Sigmoid, "beta"), (Sigmoid, "label_smoothing"), (SimPO, "gamma")])
def test_options_that_are_no_numbers(kind: type[Loss], name: str, value):
    with pytest.raises(ValueError) as caught:
        kind(**{name: value})
    assert str(caught.value) == f"{kind.__name__}: {name} {REQUIRED[name]}, but it is {value!r}."


def test_losses_are_values():
    assert Sigmoid(0.2) == Sigmoid(beta=0.2) != Sigmoid(0.3) and Sigmoid(0.1) != SigmoidNorm(0.1)
    assert len({Sigmoid(), Sigmoid(), SFT()}) == 2
    with pytest.raises(AttributeError):
        Sigmoid().beta = 1.0
    for kind in (Sigmoid, SigmoidNorm, IPO, SimPO):
        assert all(field.metadata["help"] for field in fields(kind))


def test_lengths_of_pairs_are_checked():
    with pytest.raises(Exception, match="p"):
        pairs([-1.0, -2.0], [-1.0])


# dpo_loss


def test_dpo_loss_by_hand():
    # margins 1 - (-2) = 3 and 0: beta 3 = ln 3 gives -log 3/4, and -log 1/2; their mean
    chosen, rejected = torch.tensor([-4.0, -1.0]).double(), torch.tensor([-9.0, -2.0]).double()
    ref_chosen, ref_rejected = torch.tensor([-5.0, -1.0]).double(), torch.tensor([-7.0, -2.0]).double()
    loss = dpo_loss(
        chosen, rejected, log(3) / 3, ref_chosen_logprobs=ref_chosen, ref_rejected_logprobs=ref_rejected
    )
    assert loss.shape == () and is_close(loss, (log(4 / 3) + LN2) / 2)
    # the simplified form: margins 5 and 1, beta = ln 3: sigma(5 ln 3) = 243/244, sigma(ln 3) = 3/4
    assert is_close(dpo_loss(chosen, rejected, log(3)), (log(244 / 243) + log(4 / 3)) / 2)
    # beta is 0.1 by default
    assert is_close(dpo_loss(chosen, rejected), -(log(sigmoid(0.5)) + log(sigmoid(0.1))) / 2)


@given(some_pairs(), st.floats(1e-3, 10.0))
@FAST
def test_dpo_loss_is_sigmoid(given: PairLogProbs, beta: float):
    reference = {"ref_chosen_logprobs": given.ref_chosen, "ref_rejected_logprobs": given.ref_rejected}
    loss = dpo_loss(given.chosen, given.rejected, beta, **reference)
    assert torch.equal(loss, Sigmoid(beta)(given).mean())

    # per token, of whatever width, summed over the last axis
    def split(x: Tensor) -> Tensor:
        return torch.stack([0.25 * x, torch.zeros_like(x), 0.75 * x], dim=1)

    reference = {name: split(x) for name, x in reference.items()}
    torch.testing.assert_close(dpo_loss(split(given.chosen), split(given.rejected), beta, **reference), loss)


def test_dpo_loss_gradients():
    given = pairs([-4.0, -1.0], [-9.0, -2.0], [-5.0, -1.0], [-7.0, -2.0])
    reference = [x.clone().requires_grad_() for x in (given.ref_chosen, given.ref_rejected)]
    loss = dpo_loss(
        given.chosen,
        given.rejected,
        log(3) / 3,
        ref_chosen_logprobs=reference[0],
        ref_rejected_logprobs=reference[1],
    )
    loss.backward()
    # -beta (1 - sigma) / 2: with sigma 3/4 and 1/2
    assert is_close(given.chosen.grad, [-log(3) / 3 / 8, -log(3) / 3 / 4])
    assert is_close(given.rejected.grad, [log(3) / 3 / 8, log(3) / 3 / 4])
    assert all(x.grad is None for x in reference)  # the reference does not move


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    sides = [-torch.rand(4, 1000, generator=generator) for _ in range(4)]
    sides = [x.to(dtype).requires_grad_() for x in sides]
    names = ("ref_chosen_logprobs", "ref_rejected_logprobs")
    loss = dpo_loss(*sides[:2], **dict(zip(names, sides[2:], strict=True)))
    wide = [x.detach().double() for x in sides]
    expected = dpo_loss(*wide[:2], **dict(zip(names, wide[2:], strict=True)))
    assert loss.dtype == torch.float32  # sums of a thousand tokens, exact to float32's own rounding
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert sides[0].grad.dtype == dtype and sides[0].grad.isfinite().all()
    assert dpo_loss(*[x[:, 0] for x in sides[:2]]).dtype == torch.float32


def test_dpo_loss_keeps_float64():
    assert dpo_loss(torch.zeros(2).double(), torch.zeros(2).double()).dtype == torch.float64


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), (2, 5)])
def test_dpo_loss_shapes(shape: tuple[int, ...]):
    x = torch.randn(shape)
    assert dpo_loss(x, x).shape == () and dpo_loss(x, x).item() == pytest.approx(LN2)


X, Y = torch.zeros(2), torch.zeros(3)
SHAPES = "log-probs should all have one shape, (b,) or (b, n), but the shapes are"
BOTH = "give both ref_chosen_logprobs and ref_rejected_logprobs, or neither."


@pytest.mark.parametrize(
    "sides, reference, message",
    [
        ((X, Y), (None, None), f"{SHAPES} [(2,), (3,)]."),
        ((X, X[None]), (None, None), f"{SHAPES} [(2,), (1, 2)]."),
        ((X[None], X[:, None]), (None, None), f"{SHAPES} [(1, 2), (2, 1)]."),
        ((X[0], X[0]), (None, None), f"{SHAPES} [(), ()]."),
        ((X[None, None], X[None, None]), (None, None), f"{SHAPES} [(1, 1, 2), (1, 1, 2)]."),
        ((X, X), (Y, Y), f"{SHAPES} [(2,), (2,), (3,), (3,)]."),
        ((X, X), (X, X[:1]), f"{SHAPES} [(2,), (2,), (2,), (1,)]."),
        ((X, X), (X, None), BOTH),
        ((X, X), (None, X), BOTH),
        ((X[:0], X[:0]), (None, None), "log-probs should hold at least one pair, but their shape is (0,)."),
        ((X, X, 0.0), (None, None), "Sigmoid: beta should be positive, but it is 0.0."),
        ((X, X, -1), (None, None), "Sigmoid: beta should be positive, but it is -1."),
        ((X, X, nan), (None, None), "Sigmoid: beta should be positive, but it is nan."),
    ],
)
def test_dpo_loss_refuses(sides: tuple, reference: tuple, message: str):
    with pytest.raises(ValueError) as caught:
        dpo_loss(*sides, ref_chosen_logprobs=reference[0], ref_rejected_logprobs=reference[1])
    assert str(caught.value) == message


@pytest.mark.pitfall(16)
def test_padding_changes_no_loss():
    """Pitfall 16: lengths are those of scored tokens, whatever the width of the rows."""

    def losses(width: int) -> list[Tensor]:
        # 7 | 1 2 and 7 | 3, the prompt before the bar; log-probs -3 and -5, under the reference -1 both
        def row(ids: list[int], fill) -> Tensor:
            return torch.tensor([ids + [fill] * (width - len(ids))])

        seqs = (row([7, 1, 2], 9), row([7, 3], 9))
        prompts = tuple(row([True], False) for _ in seqs)
        reals = (row([True] * 3, False), row([True] * 2, False))
        batch = PreferenceBatch.from_padded(seqs, prompts, reals)
        given = pair_log_probs(
            batch, torch.tensor([-3.0, -5.0]).double(), torch.tensor([-1.0, -1.0]).double()
        )
        return [loss(given) for loss in (IPO(1.0), SigmoidNorm(1.0), SimPO(1.0, 0.0), SFT())]

    expected = [
        (-2 / 2 - -4 / 1 - 1 / 2) ** 2,  # 6.25
        -log(sigmoid(-2 / 2 - -4 / 1)),
        -log(sigmoid(-3 / 2 - -5 / 1)),
        3 / 2,
    ]
    for width in (3, 4, 20):
        assert [x.item() for x in losses(width)] == pytest.approx(expected, rel=1e-12)
