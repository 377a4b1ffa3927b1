"""Losses by name, and the text that they are read from."""

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_wrapper import IPO, SFT, Loss, Sigmoid, SigmoidNorm, SimPO
from dpo_wrapper.losses import losses_by_name, parse_losses, weighted
from helpers.pair_log_probs import FAST


@pytest.mark.parametrize(
    "text, expected",
    [
        ("sigmoid", [(Sigmoid(), 1.0)]),
        ("Sigmoid()", [(Sigmoid(), 1.0)]),
        ("SIGMOIDNORM", [(SigmoidNorm(), 1.0)]),
        ("ipo(beta=0.3)", [(IPO(0.3), 1.0)]),
        ("simpo(gamma=0, beta=2.5)", [(SimPO(2.5, 0.0), 1.0)]),
        ("sigmoid(beta=5e-2,label_smoothing=.1)", [(Sigmoid(0.05, 0.1), 1.0)]),
        ("0.5*sft", [(SFT(), 0.5)]),
        ("  2 *\tsft( )  ", [(SFT(), 2.0)]),
        ("sigmoid(beta=0.1) + 0.5*sft", [(Sigmoid(0.1), 1.0), (SFT(), 0.5)]),
        ("sft+sft", [(SFT(), 1.0), (SFT(), 1.0)]),
        ("ipo + (sft + (2 * sft + ipo))", [(IPO(), 1.0), (SFT(), 1.0), (SFT(), 2.0), (IPO(), 1.0)]),
        ("(((sft)))", [(SFT(), 1.0)]),
        ("(0.5)*(sft)", [(SFT(), 0.5)]),
    ],
)
def test_parse_losses(text: str, expected: list[tuple[Loss, float]]):
    assert parse_losses(text) == tuple(expected)
    assert all(type(weight) is float for _, weight in parse_losses(text))


positive = st.floats(1e-6, 1e6)
some_loss = st.one_of(
    st.builds(Sigmoid, positive, st.floats(0, 0.49)),
    st.builds(SigmoidNorm, positive),
    st.builds(IPO, positive),
    st.builds(SimPO, positive, st.floats(0, 10)),
    st.just(SFT()),
)


@st.composite
def printed(draw, terms: list[tuple[Loss, float]]) -> str:
    """One of the ways to write the terms, nested sums and blanks among them."""

    def blank() -> str:
        return draw(st.sampled_from(["", " ", "  ", "\t"]))

    if len(terms) > 1:
        cut = draw(st.integers(1, len(terms) - 1))
        left, right = draw(printed(terms[:cut])), draw(printed(terms[cut:]))
        if draw(st.booleans()):
            right = f"({right})"
        return f"{left}{blank()}+{blank()}{right}"

    ((loss, weight),) = terms
    options = {f.name: getattr(loss, f.name) for f in fields(loss)}
    given = [f"{name}{blank()}={blank()}{value!r}" for name, value in options.items()]
    name = draw(st.sampled_from([type(loss).__name__, type(loss).__name__.lower()]))
    call = f"{name}{blank()}({blank()}{f'{blank()},{blank()}'.join(draw(st.permutations(given)))}{blank()})"
    return call if weight == 1.0 and draw(st.booleans()) else f"{weight!r}{blank()}*{blank()}{call}"


@given(st.data(), st.lists(st.tuples(some_loss, st.one_of(st.just(1.0), positive)), min_size=1, max_size=5))
@FAST
def test_parse_losses_reads_what_is_printed(data: st.DataObject, terms: list[tuple[Loss, float]]):
    text = data.draw(printed(terms))
    assert parse_losses(text) == weighted(terms)
    # and as Python prints it
    plain = " + ".join(f"{weight} * {loss!r}" for loss, weight in terms)
    assert parse_losses(plain) == weighted(terms)


TAKES = "beta, label_smoothing, divergence, as name=value."
KNOWN = "there are <names>."
HOW = "write it like 'sigmoid(beta=0.1) + 0.5*sft'."


@pytest.mark.parametrize(
    "text, message",
    [
        ("", f"cannot read the loss '': {HOW}"),
        ("  ", f"cannot read the loss '  ': {HOW}"),
        ("sigmoid +", f"cannot read the loss 'sigmoid +': {HOW}"),
        ("sigmoid(beta=", f"cannot read the loss 'sigmoid(beta=': {HOW}"),
        ("sigmoid; sft", f"cannot read the loss 'sigmoid; sft': {HOW}"),
        ("0.5 sft", f"cannot read the loss '0.5 sft': {HOW}"),
        ("x = sft", f"cannot read the loss 'x = sft': {HOW}"),
        ("dpo", f"unknown loss 'dpo' in 'dpo': {KNOWN}"),
        ("loss", f"unknown loss 'loss' in 'loss': {KNOWN}"),
        ("1", f"unknown loss '1' in '1': {KNOWN}"),
        ("losses.sft", f"unknown loss 'losses.sft' in 'losses.sft': {KNOWN}"),
        ("sigmoid, sft", f"unknown loss '(sigmoid, sft)' in 'sigmoid, sft': {KNOWN}"),
        ("sigmoid - sft", f"unknown loss 'sigmoid - sft' in 'sigmoid - sft': {KNOWN}"),
        ("sft / 2", f"unknown loss 'sft / 2' in 'sft / 2': {KNOWN}"),
        ("2*(sigmoid+sft)", f"unknown loss 'sigmoid + sft' in '2*(sigmoid+sft)': {KNOWN}"),
        ("sft()()", f"unknown loss 'sft()' in 'sft()()': {KNOWN}"),
        ("open(0).read()", f"unknown loss 'open(0).read' in 'open(0).read()': {KNOWN}"),
        ("sigmoid(0.1)", f"sigmoid in 'sigmoid(0.1)' takes {TAKES}"),
        (
            "sigmoid(gamma=1)",
            f"sigmoid in 'sigmoid(gamma=1)' takes {TAKES}",
        ),
        (
            "sigmoid(*[1])",
            f"sigmoid in 'sigmoid(*[1])' takes {TAKES}",
        ),
        (
            "sigmoid(**{1: 1})",
            f"sigmoid in 'sigmoid(**{{1: 1}})' takes {TAKES}",
        ),
        ("sft(beta=1)", "sft in 'sft(beta=1)' takes no options, as name=value."),
        ("ipo(beta=x)", "expected a number in 'ipo(beta=x)', got 'x'."),
        ("ipo(beta=nan)", "expected a number in 'ipo(beta=nan)', got 'nan'."),
        ("ipo(beta=[1])", "expected a number in 'ipo(beta=[1])', got '[1]'."),
        ("ipo(beta=1j)", "expected a number in 'ipo(beta=1j)', got '1j'."),
        ("ipo(beta=None)", "expected a number in 'ipo(beta=None)', got 'None'."),
        ("ipo(beta=9**9**9)", "expected a number in 'ipo(beta=9**9**9)', got '9 ** 9 ** 9'."),
        ("sft*2", "expected a number in 'sft*2', got 'sft'."),
        ("2*3*sft", "expected a number in '2*3*sft', got '2 * 3'."),
        ("ipo(beta=0)", "IPO: beta should be positive, but it is 0.0."),
        ("sft + ipo(beta=-1)", "IPO: beta should be positive, but it is -1.0."),
        ("sigmoid(label_smoothing=0.5)", "Sigmoid: label_smoothing should be in [0, 0.5), but it is 0.5."),
        ("ipo(beta=1e999)", "IPO: beta should be positive, but it is inf."),
        ("1e999*sft", "the weight of SFT should be positive, but it is inf."),
        ("0*sft", "the weight of SFT should be positive, but it is 0.0."),
        ("-1*sft", "the weight of SFT should be positive, but it is -1.0."),
    ],
)
def test_parse_losses_refuses(text: str, message: str):
    with pytest.raises(ValueError) as caught:
        parse_losses(text)
    assert str(caught.value) == message.replace("<names>", ", ".join(losses_by_name()))


@pytest.mark.parametrize(
    "text",
    [
        "sigmoid(beta=1, beta=2)",  # the first is silently dropped
        "sigmoid(beta='0.1')",
        "sigmoid(beta=True)",
        "'2' * sft",
        f"sigmoid(beta=1{'0' * 400})",  # OverflowError
    ],
    ids=lambda text: text[:30],
)
def test_parse_losses_should_refuse(text: str):
    with pytest.raises(ValueError):
        parse_losses(text)


def test_names():
    known = losses_by_name()
    expected = {"sigmoid": Sigmoid, "sigmoidnorm": SigmoidNorm, "ipo": IPO, "simpo": SimPO, "sft": SFT}
    assert expected.items() <= known.items() and "loss" not in known
    assert all(parse_losses(name) == ((kind(), 1.0),) for name, kind in expected.items())
