"""Options of losses, and the numerics that losses share."""

from itertools import product
from math import exp, inf, log, nan

import pytest
import torch

from dpo_wrapper import IPO, SFT, Loss, Sigmoid, SigmoidNorm, SimPO
from dpo_wrapper.losses import DPOP, EXO, AlphaDivergence, AlphaPO, BetaDPO, DiscoPOP, Robust
from dpo_wrapper.losses.base import log1mexp

REQUIREMENTS = {
    "beta": "should be positive",
    "label_smoothing": "should be in [0, 0.5)",
    "gamma": "should not be negative",
}
BETAS = product((Sigmoid, SigmoidNorm, IPO, SimPO), ("beta",), (0, 0.0, -0.1, nan, inf, -inf))
SMOOTHINGS = product((Sigmoid,), ("label_smoothing",), (-0.1, 0.5, 1, nan, inf, -inf))
GAMMAS = product((SimPO,), ("gamma",), (-0.5, nan, inf, -inf))
NO_NUMBERS = product(
    [(Sigmoid, "beta"), (Sigmoid, "label_smoothing"), (SimPO, "gamma")], ["0.1", None, [0.1], True]
)


@pytest.mark.parametrize(
    "loss, name, value",
    [*BETAS, *SMOOTHINGS, *GAMMAS, *((*option, value) for option, value in NO_NUMBERS)],
)
def test_options_out_of_range_are_refused(loss: type[Loss], name: str, value: object):
    with pytest.raises(ValueError) as caught:
        loss(**{name: value})
    assert str(caught.value) == f"{loss.__name__}: {name} {REQUIREMENTS[name]}, but it is {value!r}."


@pytest.mark.parametrize(
    "loss, option, requirement",
    [
        (EXO, {"label_smoothing": 0}, "be in (0, 0.5), but it is 0."),
        (Robust, {"label_smoothing": 0.5}, "be in [0, 0.5), but it is 0.5."),
        (DPOP, {"penalty": -1}, "not be negative, but it is -1."),
        (DiscoPOP, {"tau": 0}, "be positive, but it is 0."),
        (BetaDPO, {"drop": 1.0}, "be in [0, 1), but it is 1.0."),
        (AlphaPO, {"alpha": inf}, "be a number, but it is inf."),
        (AlphaDivergence, {"alpha": nan}, "be a number, but it is nan."),
        (
            Sigmoid,
            {"divergence": "forward"},
            "be a divergence, such as ForwardKL(), but it is 'forward'.",
        ),
    ],
)
def test_each_option_names_what_it_should_be(loss: type[Loss], option: dict, requirement: str):
    with pytest.raises(ValueError) as caught:
        loss(**option)
    assert str(caught.value) == f"{loss.__name__}: {next(iter(option))} should {requirement}"


def test_losses_are_values():
    assert Sigmoid(0.2) == Sigmoid(beta=0.2) != Sigmoid(0.3) and Sigmoid(0.1) != SigmoidNorm(0.1)
    assert len({Sigmoid(), Sigmoid(), SFT()}) == 2
    with pytest.raises(AttributeError):
        Sigmoid().beta = 1.0


@pytest.mark.pitfall(17)
def test_log1mexp_is_accurate_at_both_ends():
    x = torch.tensor([-1e4, -100.0, -1.0, -log(2), -0.5, -1e-3, -1e-7], dtype=torch.float64)
    exact = [0.0, -exp(-100), *(log(-torch.expm1(y).item()) for y in x[2:])]
    expected = torch.tensor(exact, dtype=torch.float64)
    torch.testing.assert_close(log1mexp(x), expected, rtol=1e-12, atol=1e-50)
    assert log1mexp(torch.tensor([0.0, -1e-30])).isfinite().all()
