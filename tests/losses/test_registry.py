"""Losses by name, the text that they are parsed from, and their descriptions."""

from dataclasses import fields
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_wrapper import IPO, SFT, Loss, Sigmoid, SigmoidNorm, SimPO
from dpo_wrapper import losses as package
from dpo_wrapper.losses import (
    AlphaDivergence,
    Divergence,
    ForwardKL,
    Hinge,
    JensenShannon,
    as_weighted_losses,
    losses_by_name,
    parse_losses,
)
from dpo_wrapper.losses.registry import (
    builtin_losses,
    describe_loss,
    losses_help,
    losses_table,
    subclasses_by_name,
)
from helpers.every_loss import EVERY_LOSS, loss_id
from helpers.pair_log_probs import SETTINGS

# from text


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
        ("sigmoid(divergence=forwardkl)", [(Sigmoid(divergence=ForwardKL()), 1.0)]),
        ("ipo(divergence=AlphaDivergence(alpha=0.3), beta=1)", [(IPO(1.0, AlphaDivergence(0.3)), 1.0)]),
        ("hinge(divergence=jensenshannon())", [(Hinge(divergence=JensenShannon()), 1.0)]),
    ],
)
def test_text_gives_the_losses(text: str, expected: list[tuple[Loss, float]]):
    assert parse_losses(text) == tuple(expected)
    assert all(type(weight) is float for _, weight in parse_losses(text))


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=loss_id)
def test_the_text_of_a_loss_gives_it_back(loss: Loss):
    assert parse_losses(repr(loss)) == ((loss, 1.0),)


def test_names_give_the_losses_with_their_defaults():
    known = losses_by_name()
    expected = {"sigmoid": Sigmoid, "sigmoidnorm": SigmoidNorm, "ipo": IPO, "simpo": SimPO, "sft": SFT}
    assert expected.items() <= known.items() and not {"loss", "pairloss", "functionloss"} & set(known)
    assert all(parse_losses(name) == ((loss(), 1.0),) for name, loss in expected.items())


positive = st.floats(1e-6, 1e6)
random_loss = st.one_of(
    st.builds(Sigmoid, positive, st.floats(0, 0.49)),
    st.builds(SigmoidNorm, positive),
    st.builds(IPO, positive),
    st.builds(SimPO, positive, st.floats(0, 10)),
    st.just(SFT()),
)


@st.composite
def random_text(draw, terms: list[tuple[Loss, float]]) -> str:
    """One of the ways to write the terms, nested sums and blanks among them."""

    def blank() -> str:
        return draw(st.sampled_from(["", " ", "  ", "\t"]))

    if len(terms) > 1:
        cut = draw(st.integers(1, len(terms) - 1))
        left, right = draw(random_text(terms[:cut])), draw(random_text(terms[cut:]))
        if draw(st.booleans()):
            right = f"({right})"
        return f"{left}{blank()}+{blank()}{right}"

    ((loss, weight),) = terms
    options = {option.name: getattr(loss, option.name) for option in fields(loss)}
    texts = [f"{name}{blank()}={blank()}{value!r}" for name, value in options.items()]
    name = draw(st.sampled_from([type(loss).__name__, type(loss).__name__.lower()]))
    call = f"{name}{blank()}({blank()}{f'{blank()},{blank()}'.join(draw(st.permutations(texts)))}{blank()})"
    return call if weight == 1.0 and draw(st.booleans()) else f"{weight!r}{blank()}*{blank()}{call}"


@given(st.data(), st.lists(st.tuples(random_loss, st.just(1.0) | positive), min_size=1, max_size=5))
@SETTINGS
def test_every_way_of_writing_losses_gives_them_back(data: st.DataObject, terms: list[tuple[Loss, float]]):
    assert parse_losses(data.draw(random_text(terms))) == as_weighted_losses(terms)
    # and as Python prints it
    text = " + ".join(f"{weight} * {loss!r}" for loss, weight in terms)
    assert parse_losses(text) == as_weighted_losses(terms)


# text that is refused


def unknown(received: str, text: str, noun: str = "loss") -> tuple[str, str]:
    return (
        text,
        f"the {noun} in {text!r} should be one of <{noun} names>, but it is {received!r}: correct it.",
    )


def no_number(received: str, text: str) -> tuple[str, str]:
    return text, f"the value in {text!r} should be a number, but it is {received!r}: correct it."


def no_options(name: str, expected: str, text: str) -> tuple[str, str]:
    return text, f"the options of {name} should be {expected}, but the loss is {text!r}: correct it."


def no_loss(text: str) -> tuple[str, str]:
    return text, (
        f"the loss should be written like 'sigmoid(beta=0.1) + 0.5*sft', but it is {text!r}: correct it."
    )


SIGMOID_OPTIONS = "beta, label_smoothing, divergence, each as name=value"
WITHOUT_DIVERGENCE = [
    (loss, f"{', '.join(names)}, each as name=value" if names else "left out")
    for loss in builtin_losses()
    if "divergence" not in (names := [option.name for option in fields(loss)])
]
KNOWN_NAMES = {"<loss names>": losses_by_name, "<divergence names>": partial(subclasses_by_name, Divergence)}


@pytest.mark.parametrize(
    "text, message",
    [
        no_loss(""),
        no_loss("  "),
        no_loss("sigmoid +"),
        no_loss("sigmoid(beta="),
        no_loss("sigmoid; sft"),
        no_loss("0.5 sft"),
        no_loss("x = sft"),
        unknown("reward", "reward"),
        unknown("loss", "loss"),
        unknown("1", "1"),
        ("sigmod", unknown("sigmod", "sigmod")[1].replace("correct it.", "did you mean sigmoid?")),
        unknown("losses.sft", "losses.sft"),
        unknown("(sigmoid, sft)", "sigmoid, sft"),
        unknown("sigmoid - sft", "sigmoid - sft"),
        unknown("sft / 2", "sft / 2"),
        unknown("sigmoid + sft", "2*(sigmoid+sft)"),
        unknown("sft()", "sft()()"),
        unknown("open(0).read", "open(0).read()"),
        no_options("sigmoid", SIGMOID_OPTIONS, "sigmoid(0.1)"),
        no_options("sigmoid", SIGMOID_OPTIONS, "sigmoid(gamma=1)"),
        no_options("sigmoid", SIGMOID_OPTIONS, "sigmoid(*[1])"),
        no_options("sigmoid", SIGMOID_OPTIONS, "sigmoid(**{1: 1})"),
        no_options("sft", "left out", "sft(beta=1)"),
        no_number("x", "ipo(beta=x)"),
        no_number("nan", "ipo(beta=nan)"),
        no_number("[1]", "ipo(beta=[1])"),
        no_number("1j", "ipo(beta=1j)"),
        no_number("None", "ipo(beta=None)"),
        no_number("9 ** 9 ** 9", "ipo(beta=9**9**9)"),
        no_number("sft", "sft*2"),
        no_number("2 * 3", "2*3*sft"),
        ("ipo(beta=0)", "IPO: beta should be positive, but it is 0.0."),
        ("sft + ipo(beta=-1)", "IPO: beta should be positive, but it is -1.0."),
        ("sigmoid(label_smoothing=0.5)", "Sigmoid: label_smoothing should be in [0, 0.5), but it is 0.5."),
        ("ipo(beta=1e999)", "IPO: beta should be positive, but it is inf."),
        ("1e999*sft", "the weight of SFT should be positive, but it is inf."),
        ("0*sft", "the weight of SFT should be positive, but it is 0.0."),
        ("-1*sft", "the weight of SFT should be positive, but it is -1.0."),
        unknown("kl", "sigmoid(divergence=kl)", "divergence"),
        unknown("sft", "sigmoid(divergence=sft)", "divergence"),
        unknown("1", "sigmoid(divergence=1)", "divergence"),
        no_options("forwardkl", "left out", "sigmoid(divergence=forwardkl(alpha=1))"),
        no_number("forwardkl", "sigmoid(beta=forwardkl)"),
        *(
            no_options(loss.__name__.lower(), options, f"{loss.__name__.lower()}(divergence=forwardkl)")
            for loss, options in WITHOUT_DIVERGENCE
        ),
    ],
)
def test_text_that_is_no_loss_is_refused(text: str, message: str):
    with pytest.raises(ValueError) as caught:
        parse_losses(text)
    for placeholder, names in KNOWN_NAMES.items():
        message = message.replace(placeholder, ", ".join(names()))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "text",
    [
        "sigmoid(beta=1, beta=2)",  # Python keeps the last
        "sigmoid(beta='0.1')",
        "sigmoid(beta=True)",
        "'2' * sft",
        f"sigmoid(beta=1{'0' * 400})",  # OverflowError
    ],
    ids=lambda text: text[:30],
)
def test_text_that_python_would_accept_is_refused(text: str):
    with pytest.raises(ValueError):
        parse_losses(text)


# in words


@pytest.mark.parametrize("loss", builtin_losses())
def test_every_loss_is_described_and_exported(loss: type[Loss]):
    words = describe_loss(loss)
    assert words["formula"] and words["paper"] and words["for"]
    assert not any("|" in text for text in words.values())
    assert all(option.metadata["help"] for option in fields(loss))
    assert f"| `{loss()!r}` |" in losses_table()
    name, text = loss.__name__.lower(), losses_help()
    assert f" {name}(" in text or f" {name}," in text
    assert getattr(package, loss.__name__) is loss, "export it from dpo_wrapper/losses/__init__.py"
