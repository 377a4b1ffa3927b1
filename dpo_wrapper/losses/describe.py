"""What the classes say of themselves, as the README's table and as the help of the command line."""

import inspect
import re
from dataclasses import dataclass, fields

from dpo_wrapper.losses.base import Configured, Loss, Objective
from dpo_wrapper.losses.registry import divergences_by_name, losses_by_name


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


def ours() -> list[type[Objective]]:
    """The package's own losses, those of pairs first; there may be a user's as well."""
    known = [kind for kind in losses_by_name().values() if kind.__module__.startswith("dpo_wrapper.")]
    return sorted(known, key=lambda kind: not issubclass(kind, Loss))


def table() -> str:
    """The README's table of losses, in Markdown."""
    lines = ["| loss | formula | reference | paper | for |", "| --- | --- | --- | --- | --- |"]
    for kind in ours():
        of = describe(kind)
        reference = "yes" if kind.needs_reference else "no"
        lines.append(f"| `{of.shown}` | `{of.formula}` | {reference} | {of.paper} | {of.purpose} |")
    return "\n".join(lines)


def help_text() -> str:
    """Names and options, for the command line."""

    def signature(kind: type[Configured]) -> str:
        options = ", ".join(each.name for each in fields(kind))
        return f"{kind.__name__.lower()}({options})" if options else kind.__name__.lower()

    pairs = ", ".join(signature(kind) for kind in ours() if kind.data.unit == "pairs")
    others = ", ".join(
        f"{signature(kind)} ({kind.data.unit})" for kind in ours() if kind.data.unit != "pairs"
    )
    divergences = ", ".join(map(signature, divergences_by_name().values()))
    return (
        "Sum of losses, each a name with its options, like 'sigmoid(beta=0.1) + 0.5*sft'. "
        f"Losses of pairs: {pairs}; of ranked lists or of single rows with a label: {others}. "
        f"Divergences, as in sigmoid(divergence=forwardkl): {divergences}."
    )
