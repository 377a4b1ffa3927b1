"""More losses against numbers derived by hand; their limits; weights and margins; functions as losses.

One pair throughout, unless a test says otherwise: p_w = -4, p_l = -9, r_w = -6, r_l = -5, n_w = 2, n_l = 4,
so a = 2 and b = -4, Δ = 6.
"""

from dataclasses import replace
from functools import partial
from math import exp, inf, log, log1p, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dpo_wrapper import IPO, SFT, Loss, PairLogProbs, Sigmoid, SimPO
from dpo_wrapper.losses import (
    AOT,
    BCO,
    CPO,
    DPOP,
    EXO,
    NCA,
    ORPO,
    SPPO,
    AlphaDivergence,
    AlphaPO,
    AOTUnpaired,
    APODown,
    APOZero,
    BetaDPO,
    DiscoPOP,
    ForwardKL,
    Hinge,
    JensenShannon,
    PromptedLogProbs,
    ReferenceFree,
    ReverseKL,
    Robust,
    RunningGap,
    SigmoidNorm,
    combined,
    parse_losses,
    weighted,
)
from dpo_wrapper.losses.base import log1mexp
from helpers.pair_log_probs import FAST, grads, is_close, pairs, sigmoid, some_pairs

LN2, LN3 = log(2), log(3)
ONE = partial(pairs, [-4.0], [-9.0], [-6.0], [-5.0], [2], [4])


def test_robust_by_hand():
    # sigma(βΔ) = 3/4
    expected = (0.75 * log(4 / 3) - 0.25 * log(4)) / 0.5
    assert is_close(Robust(LN3 / 6, 0.25)(ONE()), [expected])
    # d/da = -β (3/4 (1 - 3/4) + 1/4 3/4) / (1/2)
    assert is_close(grads(Robust(LN3 / 6, 0.25), ONE())[0], [-LN3 / 6 * (3 / 16 + 3 / 16) / 0.5])


def test_hinge_by_hand():
    assert is_close(Hinge(1 / 12)(ONE()), [0.5]) and is_close(grads(Hinge(1 / 12), ONE())[0], [-1 / 12])
    assert is_close(Hinge(1.0)(ONE()), [0.0]) and is_close(grads(Hinge(1.0), ONE())[1], [0.0])


def test_exo_by_hand():
    # sigma(βΔ) = 3/4, which is what labels with ε = 1/4 ask for; with ε = 1/8 it is not
    assert is_close(EXO(LN3 / 6, 0.25)(ONE()), [0.0])
    assert is_close(EXO(LN3 / 6, 0.125)(ONE()), [0.75 * log(6 / 7) + 0.25 * log(2)])


def test_discopop_by_hand():
    # τ = 1: w = 3/4, -log σ(z) = ln(4/3), e^-z = 1/3
    assert is_close(DiscoPOP(LN3 / 6, tau=1.0)(ONE()), [0.25 * log(4 / 3) + 0.25])


def test_dpop_by_hand():
    # chosen above its reference: DPO itself
    assert is_close(DPOP(LN3 / 6)(ONE()), [log(4 / 3)])
    # a = -2, b = -4, lost 2: 2 - 2 / 2 = 1; the slope in a is -β (1 + 1/2) / 4
    fallen = pairs([-6.0], [-9.0], [-4.0], [-5.0])
    assert is_close(DPOP(LN3, penalty=0.5)(fallen), [log(4 / 3)])
    assert is_close(grads(DPOP(LN3, penalty=0.5), fallen)[0], [-LN3 * 1.5 / 4])


def test_pointwise_losses_by_hand():
    # β = ln 3 / 2: σ(βa) = 3/4, σ(βb) = 1/10, σ(β(a - b)) = 27/28
    beta = LN3 / 2
    assert is_close(NCA(beta)(ONE()), [log(4 / 3) + 0.5 * log(4) + 0.5 * log(10 / 9)])
    assert is_close(BCO(beta)(ONE()), [log(4 / 3) + log(10 / 9)])
    assert is_close(APOZero(beta)(ONE()), [0.25 + 0.1])
    assert is_close(APODown(beta)(ONE()), [0.75 + 1 / 28])
    # targets 1 and -1: (2 - 1)^2 + (-4 + 1)^2
    assert is_close(SPPO(0.5)(ONE()), [10.0])
    assert is_close(grads(SPPO(0.5), ONE())[1], [-6.0])


def test_losses_without_reference_by_hand():
    # p_w - p_l = 5, β 5 = ln 7: σ = 7/8
    assert is_close(ReferenceFree(log(7) / 5)(ONE()), [log(8 / 7)])
    assert is_close(ReferenceFree(log(7) / 5, 0.25)(ONE()), [0.75 * log(8 / 7) + 0.25 * log(8)])
    # and 3/2 times 4 / 2 nats per token
    assert is_close(CPO(log(7) / 5, alpha=1.5)(ONE()), [log(8 / 7) + 3.0])
    # means -1 and -2, α = ln 2: rewards -1 / ln 2 and -3 / ln 2
    short = pairs([-1.0], [-4.0], n_w=[1], n_l=[2])
    assert is_close(AlphaPO(LN2 * LN3 / 2, gamma=0.0, alpha=LN2)(short), [log(4 / 3)])
    # means ln(3/4) and ln(1/4): odds 3 and 1/3, o = ln 9
    odds = pairs([log(3 / 4)], [2 * log(1 / 4)], n_w=[1], n_l=[2])
    assert is_close(ORPO(1.0)(odds), [log(4 / 3) + log(10 / 9)])
    # prompt and chosen have 6 nats on 4 tokens
    whole = PromptedLogProbs(
        torch.tensor([-6.0], dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64)
    )
    assert is_close(ORPO(1.0, prompt=True)(replace(odds, prompted=whole)), [1.5 + log(10 / 9)])
    with pytest.raises(ValueError, match="there are no log-probs of prompts"):
        ORPO(prompt=True)(odds)


def test_aot_by_hand():
    # p_w - p_l is 5 and 1, r_w - r_l is 2 and 4: sorted, 1 - 2 and 5 - 4
    batch = pairs([-1.0, -4.0], [-6.0, -5.0], [-1.0, -1.0], [-3.0, -5.0])
    assert is_close(AOT(LN3)(batch), [log(4), log(4 / 3)])
    # a is 2 and -1, b is 0 and -3: sorted, -1 + 3 and 2 - 0
    batch = pairs([-1.0, -2.0], [-1.0, -4.0], [-3.0, -1.0], [-1.0, -1.0])
    assert is_close(AOTUnpaired(LN3 / 2)(batch), [log(4 / 3), log(4 / 3)])


def test_beta_dpo_by_hand():
    # A is 6 and 2, their mean 4; M = 0.1 4 at the first step: β' = β (1 + k 3.6) = 2.8 β
    batch = pairs([-1.0, -1.0], [-7.0, -3.0], [-1.0, -1.0], [-1.0, -1.0])
    assert is_close(BetaDPO(LN3 / 5.6, k=0.5)(batch), [log(28 / 27), log(4 / 3)])
    # where M has been 30: M = 27.4, β' would be below 0 and is 0.001
    later = replace(
        batch, gap=RunningGap(torch.tensor(30.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    )
    assert is_close(BetaDPO(LN3 / 5.6, k=0.5)(later), [log1p(exp(-6e-3)), log1p(exp(-2e-3))])
    # β' is no part of the gradient
    slope = -2.8 * LN3 / 5.6 / 4
    assert is_close(grads(BetaDPO(LN3 / 5.6, k=0.5), batch)[0][1:], [slope])


def test_beta_dpo_drops_what_is_far_from_the_mean():
    gaps = [1.0, 1.1, 0.9, 500.0]
    gap = RunningGap(torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64))
    batch = replace(pairs([0.0] * 4, [-x for x in gaps]), gap=gap)
    for seed in range(5):
        torch.manual_seed(seed)
        values = BetaDPO(drop=0.25)(batch)
        assert values[3] == 0 and (values[:3] > 0).all()
    # what stays counts for what is left out: the mean over all is the mean over the kept
    assert BetaDPO(drop=0.25, k=0.0)(batch).mean().item() == pytest.approx(
        sum(-log(sigmoid(0.1 * x)) for x in gaps[:3]) / 3
    )
    assert len(BetaDPO(drop=0.9)(pairs([-1.0], [-2.0]))) == 1


def test_divergences_by_hand():
    ln2 = torch.tensor([LN2], dtype=torch.float64)
    assert is_close(ReverseKL()(ln2), [LN2]) and is_close(ForwardKL()(ln2), [0.5])
    assert is_close(JensenShannon()(ln2), [log(4 / 3)])
    # (e^(-a / 2) - 1) / (-1/2) at a = 2 ln 2
    assert is_close(AlphaDivergence()(2 * ln2), [1.0])
    assert is_close(Hinge(1.0, ForwardKL())(pairs([LN2], [0.0])), [0.5])
    far = torch.tensor([-1e4], requires_grad=True)
    for of in (ForwardKL(), AlphaDivergence(), AlphaDivergence(3.0), JensenShannon()):
        for x in (far, -far):
            assert of(x).isfinite() and of(x).square().isfinite()


@pytest.mark.pitfall(17)
def test_log1mexp():
    x = torch.tensor([-1e4, -100.0, -1.0, -LN2, -0.5, -1e-3, -1e-7], dtype=torch.float64)
    exact = [0.0, -exp(-100), *(log(-torch.expm1(y).item()) for y in x[2:])]
    expected = torch.tensor(exact, dtype=torch.float64)
    torch.testing.assert_close(log1mexp(x), expected, rtol=1e-12, atol=1e-50)
    assert log1mexp(torch.tensor([0.0, -1e-30])).isfinite().all()


# limits


@given(some_pairs(), st.floats(1e-3, 10.0))
@FAST
def test_limits(given: PairLogProbs, beta: float):
    def same(left: Loss, right: Loss) -> None:
        torch.testing.assert_close(left(given), right(given), rtol=1e-9, atol=1e-9)

    dpo = Sigmoid(beta)
    same(Robust(beta, 0.0), dpo)
    same(DPOP(beta, penalty=0.0), dpo)
    same(BetaDPO(beta, k=0.0), dpo)
    same(CPO(beta, 0.1, alpha=0.0), ReferenceFree(beta, 0.1))
    same(AlphaPO(beta, 0.3, alpha=0.0), SimPO(beta, 0.3))
    for kind in (Sigmoid, SigmoidNorm, Hinge, IPO, Robust, EXO, DiscoPOP):
        same(kind(beta, divergence=AlphaDivergence(1.0)), kind(beta))
    zeros = torch.zeros_like(given.chosen)
    bare = replace(given, ref_chosen=zeros, ref_rejected=zeros)
    assert torch.equal(Sigmoid(beta)(bare), ReferenceFree(beta)(given))
    # a batch of one pair is sorted already
    first = replace(given, **{k: x[:1] for k, x in vars(given).items() if x is not None and x.ndim})
    for sorted_ in (AOT(beta, 0.1), AOTUnpaired(beta, 0.1)):
        torch.testing.assert_close(sorted_(first), Sigmoid(beta, 0.1)(first))


@given(st.floats(-8.0, 8.0))
@FAST
def test_near_limits(x: float):
    a = torch.tensor([x], dtype=torch.float64)
    torch.testing.assert_close(AlphaDivergence(1 - 1e-9)(a), a, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(AlphaDivergence(0.0)(a), ForwardKL()(a))
    short = pairs([-abs(x)], [-1.0])
    torch.testing.assert_close(AlphaPO(alpha=1e-9)(short), SimPO()(short), rtol=1e-7, atol=1e-7)
    tiny = EXO(0.5, 1e-9)(short)
    assert tiny.isfinite() and tiny >= -1e-12


@given(some_pairs(), st.floats(1e-3, 1.0))
@FAST
def test_swapping_sides(given: PairLogProbs, beta: float):
    turned = replace(
        given,
        chosen=given.rejected,
        rejected=given.chosen,
        ref_chosen=given.ref_rejected,
        ref_rejected=given.ref_chosen,
    )
    z = beta * (given.chosen_logratio - given.rejected_logratio)

    def differ(loss: Loss, by: Tensor) -> None:
        torch.testing.assert_close(loss(given) - loss(turned), by, rtol=1e-9, atol=1e-7)

    differ(Sigmoid(beta, 0.2), -0.6 * z)
    differ(Robust(beta, 0.2), -z / 0.6)
    differ(BCO(beta), -beta * given.chosen_logratio + beta * given.rejected_logratio)
    chosen, rejected = beta * given.chosen_logratio, beta * given.rejected_logratio
    differ(APOZero(beta), 2 * torch.sigmoid(rejected) - 2 * torch.sigmoid(chosen))
    # robust's mean over labels that are wrong at its rate is the loss of the right ones
    mean = 0.8 * Robust(beta, 0.2)(given) + 0.2 * Robust(beta, 0.2)(turned)
    torch.testing.assert_close(mean, Sigmoid(beta)(given), rtol=1e-9, atol=1e-7)


@given(some_pairs(least=2))
@FAST
def test_sorted_losses_do_not_mind_the_order(given: PairLogProbs):
    turned = replace(given, **{k: x.flip(0) for k, x in vars(given).items() if x is not None and x.ndim})
    for loss in (AOT(), AOTUnpaired(), BetaDPO()):
        torch.testing.assert_close(loss(given).sum(), loss(turned).sum())
        for a, b in zip(grads(loss, given), grads(loss, turned), strict=True):
            torch.testing.assert_close(a.sum(), b.sum())


# weights and margins of the data


def test_margins_by_hand():
    margin = torch.tensor([LN3], dtype=torch.float64)
    given = replace(ONE(), margins=margin)
    # βΔ = 2 ln 3, less ln 3
    for loss in (Sigmoid(LN3 / 3), Robust(LN3 / 3, 0.0), DPOP(LN3 / 3)):
        assert is_close(loss(given), [log(4 / 3)])
    assert is_close(Hinge(1 / 6)(given), [LN3])  # 1 - (1 - ln 3)
    assert is_close(SigmoidNorm(LN3)(given), [log(4 / 3)])  # β 2 - ln 3
    assert is_close(ReferenceFree(2 * LN3 / 5)(given), [log(4 / 3)])
    assert is_close(CPO(2 * LN3 / 5, alpha=0.0)(given), [log(4 / 3)])
    assert is_close(SimPO(12 * LN3, gamma=LN3)(given), [log(4 / 3)])  # 12 / 4 - 1 - 1
    assert is_close(AlphaPO(12 * LN3, gamma=LN3, alpha=0.0)(given), [log(4 / 3)])
    assert is_close(BetaDPO(LN3 / 3, k=0.0)(given), [log(4 / 3)])
    zero = replace(ONE(), margins=torch.zeros(1).double())
    assert torch.equal(Sigmoid()(zero), Sigmoid()(ONE()))


def test_weights_by_hand():
    two = pairs([-2.0, -4.0], [-7.0, -8.0], [-2.0, -4.0], [-7.0, -8.0], [1, 3], [1, 1])
    given = replace(two, pair_weights=torch.tensor([0.5, 2.0], dtype=torch.float64))
    values = combined(weighted([(Sigmoid(), 0.8), (SFT(), 0.5)]), given)
    assert is_close(values, [0.5 * (0.8 * LN2 + 0.5), 2 * (0.8 * LN2 + 1.0)])


def test_columns_that_cannot_act_are_refused():
    one = torch.ones(1).double()
    for loss in (IPO(), EXO(), DiscoPOP(), NCA(), BCO(), SPPO(), APOZero(), APODown(), SFT(), ORPO(), AOT()):
        with pytest.raises(ValueError, match=f"margins have no meaning for {type(loss).__name__}, which"):
            combined(weighted(loss), replace(ONE(), margins=one))
    for loss in (AOT(), AOTUnpaired(), BetaDPO()):
        with pytest.raises(ValueError, match=f"weights of pairs have no meaning for {type(loss).__name__}"):
            combined(weighted([(loss, 1.0), (SFT(), 1.0)]), replace(ONE(), pair_weights=one))
    # beside a loss that takes them, another may leave margins alone
    assert combined(weighted([(Sigmoid(), 1.0), (SFT(), 1.0)]), replace(ONE(), margins=one)).isfinite()


# a function as a loss


def mine(pairs: PairLogProbs) -> Tensor:
    return (pairs.chosen_logratio - pairs.rejected_logratio).square()


def test_a_function_is_a_loss():
    terms = weighted([(mine, 0.5), (SFT(), 1.0)])
    assert is_close(combined(terms, ONE()), [18 + 4 / 2])
    assert terms[0][0].needs_reference and weighted(mine)[0][1] == 1.0
    assert is_close(combined(weighted(lambda pairs: pairs.chosen), ONE()), [-4.0])
    with pytest.raises(ValueError, match=r"one value per pair, .* \(1,\), but mean gave \(\): leave"):
        combined(weighted(mean), ONE())


def mean(pairs: PairLogProbs) -> Tensor:
    return pairs.chosen.mean()


def test_half_precision_is_widened():
    given = pairs([-4.0], [-9.0], [-6.0], [-5.0], dtype=torch.bfloat16)
    assert given.chosen.dtype == given.ref_chosen.dtype == torch.float32


# options


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: EXO(label_smoothing=0), "EXO: label_smoothing should be in (0, 0.5), but it is 0."),
        (
            lambda: Robust(label_smoothing=0.5),
            "Robust: label_smoothing should be in [0, 0.5), but it is 0.5.",
        ),
        (lambda: DPOP(penalty=-1), "DPOP: penalty should not be negative, but it is -1."),
        (lambda: DiscoPOP(tau=0), "DiscoPOP: tau should be positive, but it is 0."),
        (lambda: BetaDPO(drop=1.0), "BetaDPO: drop should be in [0, 1), but it is 1.0."),
        (lambda: AlphaPO(alpha=inf), "AlphaPO: alpha should be a number, but it is inf."),
        (lambda: AlphaDivergence(nan), "AlphaDivergence: alpha should be a number, but it is nan."),
        (
            lambda: Sigmoid(divergence="forward"),
            "Sigmoid: divergence should be a divergence, such as ForwardKL(), but it is 'forward'.",
        ),
    ],
)
def test_bad_options(make, message: str):
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "kind", [NCA, BCO, SPPO, APOZero, APODown, AOT, DPOP, BetaDPO, SimPO, CPO, ORPO, SFT]
)
def test_divergences_are_refused_elsewhere(kind: type[Loss]):
    with pytest.raises(TypeError, match="divergence"):
        kind(divergence=ForwardKL())
    name = kind.__name__.lower()
    with pytest.raises(ValueError, match=rf"^{name} in .* takes .*, as name=value\.$"):
        parse_losses(f"{name}(divergence=forwardkl)")


@pytest.mark.parametrize(
    "text, loss",
    [
        ("sigmoid(divergence=forwardkl)", Sigmoid(divergence=ForwardKL())),
        ("ipo(divergence=AlphaDivergence(alpha=0.3), beta=1)", IPO(1.0, AlphaDivergence(0.3))),
        ("hinge(divergence=jensenshannon())", Hinge(divergence=JensenShannon())),
    ],
)
def test_divergences_as_text(text: str, loss: Loss):
    assert parse_losses(text) == ((loss, 1.0),)


@pytest.mark.parametrize(
    "text, message",
    [
        ("sigmoid(divergence=kl)", "unknown divergence 'kl' in .*: there are reversekl, forwardkl, "),
        ("sigmoid(divergence=sft)", "unknown divergence 'sft'"),
        ("sigmoid(divergence=1)", "unknown divergence '1'"),
        ("sigmoid(divergence=forwardkl(alpha=1))", "forwardkl in .* takes no options, as name=value"),
        ("sigmoid(beta=forwardkl)", "expected a number in .*, got 'forwardkl'"),
    ],
)
def test_text_that_is_refused(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_losses(text)
