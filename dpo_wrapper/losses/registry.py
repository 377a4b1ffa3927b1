"""Losses by name: the text that they are parsed from, their help, and the documentation's table."""

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from difflib import get_close_matches
from inspect import isabstract
from typing import Any

from dpo_wrapper.losses.base import Loss, PairLoss, ValidatedDataclass
from dpo_wrapper.losses.combine import WeightedLosses, as_weighted_losses
from dpo_wrapper.losses.divergences import Divergence

SYNONYMS = {"dpo": "sigmoid"}
"""Other names of losses."""


def subclasses_by_name(base: type[ValidatedDataclass]) -> dict[str, type[Any]]:
    """Every class below `base` that can be made from its defaults, under its lower-case name."""

    def iterate(parent: type[ValidatedDataclass]) -> Iterator[type[ValidatedDataclass]]:
        for child in parent.__subclasses__():
            if not isabstract(child) and all(option.default is not MISSING for option in fields(child)):
                yield child
            yield from iterate(child)

    return {child.__name__.lower(): child for child in iterate(base)}


def losses_by_name() -> dict[str, type[Loss]]:
    return subclasses_by_name(Loss)


def builtin_losses() -> list[type[Loss]]:
    """The package's own losses, those of pairs first; a user may have defined others."""
    builtin = [loss for loss in losses_by_name().values() if loss.__module__.startswith("dpo_wrapper.")]
    return sorted(builtin, key=lambda loss: not issubclass(loss, PairLoss))


def parse_losses(text: str) -> WeightedLosses:
    """Parse `"sigmoid(beta=0.1) + 0.5*sft"` into weighted losses.

    A term is a loss's name with its options in brackets and, in front, a weight if it should not be 1. A
    divergence is written in the same way: `sigmoid(divergence=forwardkl)`.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError:
        expected = "the loss should be written like 'sigmoid(beta=0.1) + 0.5*sft'"
        raise ValueError(f"{expected}, but it is {text!r}: correct it.") from None
    return as_weighted_losses(list(_parse_terms(tree.body, text)))


def _parse_terms(node: ast.expr, text: str) -> Iterator[tuple[Loss, float]]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from _parse_terms(node.left, text)
        yield from _parse_terms(node.right, text)
        return
    weight = 1.0
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        weight, node = _parse_number(node.left, text), node.right
    yield _parse_call(node, Loss, text), weight


def _parse_call(node: ast.expr, base: type[ValidatedDataclass], text: str) -> Any:
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    name = call.func.id.lower() if isinstance(call.func, ast.Name) else ast.unparse(call.func)
    classes, name = subclasses_by_name(base), SYNONYMS.get(name, name)
    if name not in classes:
        expected = f"the {base.__name__.lower()} in {text!r} should be one of {', '.join(classes)}"
        close = get_close_matches(name, classes, n=1, cutoff=0.75) if name.isidentifier() else []
        remedy = f"did you mean {close[0]}?" if close else "correct it."
        raise ValueError(f"{expected}, but it is {name!r}: {remedy}")
    types: dict[str, Any] = {option.name: option.metadata.get("type") for option in fields(classes[name])}
    values = {str(keyword.arg): keyword.value for keyword in call.keywords}
    if call.args or len(values) < len(call.keywords) or not set(values) <= set(types):
        expected = f"{', '.join(types)}, each as name=value" if types else "left out"
        raise ValueError(f"the options of {name} should be {expected}, but the loss is {text!r}: correct it.")
    options = {}
    for option, value in values.items():
        parent = types[option]
        options[option] = _parse_number(value, text) if parent is None else _parse_call(value, parent, text)
    return classes[name](**options)


def _parse_number(node: ast.expr, text: str) -> float:
    try:
        value = ast.literal_eval(node)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError
        return float(value)
    except (ValueError, TypeError, OverflowError):
        problem = f"the value in {text!r} should be a number, but it is {ast.unparse(node)!r}"
        raise ValueError(f"{problem}: correct it.") from None


def describe_loss(loss: type[Loss]) -> dict[str, str]:
    """A row of the table of losses, by column; what the class's docstring lacks is empty."""
    doc = inspect.getdoc(loss) or ""

    def paragraph(name: str) -> str:
        match = re.search(rf"^{name}: (.*?)(?:^\w+: |\n\n|\Z)", doc, flags=re.DOTALL | re.MULTILINE)
        return " ".join(match[1].split()) if match else ""

    match = re.search(r"`([^`]+)`(?: with `([^`]+)`)?", doc.split("\n\n")[0])
    formulas = [" ".join(part.split()) for part in match.groups() if part] if match else []
    return {
        "loss": f"`{loss()!r}`",
        "formula": f"`{', '.join(formulas)}`" if formulas else "",
        "reference": "yes" if loss.needs_reference else "no",
        "paper": paragraph("Paper"),
        "for": paragraph("For"),
    }


def losses_table() -> str:
    """The documentation's table of losses, in Markdown."""
    rows = [describe_loss(loss) for loss in builtin_losses()]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def losses_help() -> str:
    """Names and options, for the command line."""

    def signature(loss: type[ValidatedDataclass]) -> str:
        options = ", ".join(option.name for option in fields(loss))
        return f"{loss.__name__.lower()}({options})" if options else loss.__name__.lower()

    def signatures(dataset_type: str) -> str:
        losses = [loss for loss in builtin_losses() if loss.log_probs_type.dataset_type == dataset_type]
        return ", ".join(map(signature, losses))

    divergences = ", ".join(map(signature, subclasses_by_name(Divergence).values()))
    return (
        "Sum of losses, each a name with its options, like 'sigmoid(beta=0.1) + 0.5*sft'; dpo is sigmoid. "
        f"Losses of pairs: {signatures('preference')}; of ranked lists: {signatures('ranked')}; of "
        f"completions with a label: {signatures('unpaired_preference')}. "
        f"Divergences, as in sigmoid(divergence=forwardkl): {divergences}."
    )
