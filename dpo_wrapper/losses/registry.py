"""Losses by name: what there is, and the text that they are read from."""

import ast
from collections.abc import Iterator
from dataclasses import MISSING, fields
from inspect import isabstract
from typing import Any

from dpo_wrapper.losses.base import Configured, Objective
from dpo_wrapper.losses.combine import WeightedLosses, weighted
from dpo_wrapper.losses.divergences import Divergence


def by_name(kind: type[Configured]) -> dict[str, type[Any]]:
    """Every class below `kind` that can be made from its defaults, under its lower-case name."""

    def below(cls: type[Configured]) -> Iterator[type[Configured]]:
        for each in cls.__subclasses__():
            if not isabstract(each) and all(f.default is not MISSING for f in fields(each)):
                yield each
            yield from below(each)

    return {cls.__name__.lower(): cls for cls in below(kind)}


def losses_by_name() -> dict[str, type[Objective]]:
    """Every loss under its lower-case name, for the command line; those of other data than pairs as well."""
    return by_name(Objective)


def divergences_by_name() -> dict[str, type[Divergence]]:
    return by_name(Divergence)


def parse_losses(text: str) -> WeightedLosses:
    """Read `"sigmoid(beta=0.1) + 0.5*sft"` as a list of weighted losses.

    A term is a loss's name, its options in brackets if they are not to be the default, and a factor in front
    if its weight is not to be 1; a divergence is written in the same way, `sigmoid(divergence=forwardkl)`.
    Raises ValueError with what may stand there.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError:
        raise ValueError(
            f"cannot read the loss {text!r}: write it like 'sigmoid(beta=0.1) + 0.5*sft'."
        ) from None
    return weighted(list(_terms(tree.body, text)))


def _terms(node: ast.expr, text: str) -> Iterator[tuple[Objective, float]]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from _terms(node.left, text)
        yield from _terms(node.right, text)
        return
    weight = 1.0
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        weight, node = _number(node.left, text), node.right
    yield _made(node, Objective, text), weight


def _made(node: ast.expr, kind: type[Configured], text: str) -> Any:
    """The loss or the divergence that a name, perhaps with options in brackets, stands for."""
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    name = call.func.id.lower() if isinstance(call.func, ast.Name) else ast.unparse(call.func)
    known = by_name(kind)
    if name not in known:
        what = "loss" if kind is Objective else kind.__name__.lower()
        raise ValueError(f"unknown {what} {name!r} in {text!r}: there are {', '.join(known)}.")
    options: dict[str, Any] = {f.name: f.metadata.get("kind") for f in fields(known[name])}
    given = {str(keyword.arg): keyword.value for keyword in call.keywords}
    if call.args or len(given) < len(call.keywords) or not set(given) <= set(options):
        raise ValueError(f"{name} in {text!r} takes {', '.join(options) or 'no options'}, as name=value.")
    return known[name](**{key: _value(value, options[key], text) for key, value in given.items()})


def _value(node: ast.expr, kind: Any, text: str) -> Any:
    """An option: a number, a switch, or something with a name of its own."""
    if kind is None:
        return _number(node, text)
    if kind is not bool:
        return _made(node, kind, text)
    word = ast.unparse(node).lower()
    if word not in ("true", "false"):
        raise ValueError(f"expected true or false in {text!r}, got {ast.unparse(node)!r}.")
    return word == "true"


def _number(node: ast.expr, text: str) -> float:
    try:
        value = ast.literal_eval(node)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError
        return float(value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"expected a number in {text!r}, got {ast.unparse(node)!r}.") from None
