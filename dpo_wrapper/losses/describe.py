"""What the classes say of themselves, as the README's table and as the help of the command line."""

import inspect
import re
from dataclasses import dataclass, fields

from dpo_wrapper.losses.base import Configured, Loss, Objective
from dpo_wrapper.losses.parse import divergences_by_name, losses_by_name, objectives_by_name


@dataclass(frozen=True)
class Description:
    """A loss in words: `shown` is how it is made with its defaults."""

    shown: str
    formula: str
    paper: str
    purpose: str


def describe(kind: type[Configured]) -> Description:
    """What a class's docstring says; what is missing in it is empty."""
    doc = inspect.getdoc(kind) or ""

    def paragraph(name: str) -> str:
        found = re.search(rf"^{name}: (.*?)(?:^\w+: |\n\n|\Z)", doc, flags=re.DOTALL | re.MULTILINE)
        return " ".join(found[1].split()) if found else ""

    formula = re.search(r"`([^`]+)`(?: with `([^`]+)`)?", doc.split("\n\n")[0])
    parts = [part for part in formula.groups() if part] if formula else []
    shown = ", ".join(" ".join(part.split()) for part in parts)
    return Description(repr(kind()), shown, paragraph("Paper"), paragraph("For"))


def ours() -> list[type[Loss]]:
    """The package's own losses; there may be a user's as well."""
    return [kind for kind in losses_by_name().values() if kind.__module__.startswith("dpo_wrapper.")]


def others() -> list[type[Objective]]:
    """The package's losses of other data than pairs."""
    known = objectives_by_name().values()
    return [x for x in known if not issubclass(x, Loss) and x.__module__.startswith("dpo_wrapper.")]


def table() -> str:
    """The README's table of losses, in Markdown."""
    lines = ["| loss | formula | reference | paper | for |", "| --- | --- | --- | --- | --- |"]
    for kind in [*ours(), *others()]:
        of = describe(kind)
        reference = "yes" if kind.needs_reference else "no"
        lines.append(f"| `{of.shown}` | `{of.formula}` | {reference} | {of.paper} | {of.purpose} |")
    return "\n".join(lines)


def help_text() -> str:
    """Names and options, for the command line."""

    def signature(kind: type[Configured]) -> str:
        options = ", ".join(each.name for each in fields(kind))
        return f"{kind.__name__.lower()}({options})" if options else kind.__name__.lower()

    losses = ", ".join(map(signature, ours()))
    divergences = ", ".join(map(signature, divergences_by_name().values()))
    return (
        "Sum of losses, each a name with its options, like 'sigmoid(beta=0.1) + 0.5*sft'. "
        f"Losses: {losses}. Divergences, as in sigmoid(divergence=forwardkl): {divergences}."
    )
