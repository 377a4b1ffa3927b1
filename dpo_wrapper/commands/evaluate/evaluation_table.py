"""The figures of an evaluation as a person reads them in a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_wrapper.evaluation.report import align_columns
from dpo_wrapper.evaluation.statistics.figures import ACCURACY, SUBSET_MEAN
from dpo_wrapper.metrics import format_metric

SHARE, NATS, SMALL, TOKENS = "{:.1%}", "{:.2f}", "{:.3f}", "{:.1f}"

ROWS = (
    ("reward accuracy", ACCURACY, SHARE),
    ("  mean of the subsets", SUBSET_MEAN, SHARE),
    ("  chosen is longer", "accuracy/chosen_longer", SHARE),
    ("  chosen is shorter", "accuracy/chosen_shorter", SHARE),
    ("  lengths balanced", "accuracy/lengths_balanced", SHARE),
    ("the longer answer is chosen", "length/longer_wins", SHARE),
    ("reward margin", "rewards/margins", SMALL),
    ("calibration error", "calibration/error", SMALL),
    ("Brier score", "calibration/brier", SMALL),
    ("log-prob of chosen", "logps/chosen", NATS),
    ("  against the reference", "logratios/chosen", NATS),
    ("    per token", "logratios/chosen_per_token", SMALL),
    ("log-prob of rejected", "logps/rejected", NATS),
    ("  against the reference", "logratios/rejected", NATS),
    ("    per token", "logratios/rejected_per_token", SMALL),
    ("perplexity of chosen", "perplexity/chosen", NATS),
    ("  of the reference", "perplexity/ref_chosen", NATS),
    ("tokens of chosen", "length/chosen", TOKENS),
    ("tokens of rejected", "length/rejected", TOKENS),
)
"""Label, name and format of each row of the table."""


def format_evaluation(content: Mapping[str, Any]) -> str:
    """The tables, below one another."""
    tables = [format_figures(content["figures"], ROWS)]
    if "subsets" in content:
        tables.append(format_subsets(content["subsets"]))
    if "reliability" in content:
        tables.append(format_bins(content["reliability"], "confidence", "{:.0%}", has_confidence=True))
    tables.append(format_bins(content["length_bins"], "tokens of chosen - rejected", "{:+.0f}"))
    if "answers" in content:
        tables.append(format_answers(content["answers"]))
    return "\n\n".join(tables)


def format_figures(
    figures: Mapping[str, Mapping[str, float | None]], rows: Sequence[tuple[str, str, str]]
) -> str:
    """One line for each figure that is there, with its interval."""
    lines = [["", "value", "95% interval"]]
    for label, name, template in rows:
        if name in figures:
            lines.append([label, *format_cells(figures[name], template)])
    return align_columns(lines)


def format_subsets(subsets: Mapping[str, Any]) -> str:
    lines = [["subset", "pairs", "accuracy", "95% interval", "margin"]]
    for name, content in subsets.items():
        figures = content["figures"]
        margin = format_cells(figures["rewards/margins"], SMALL)[0]
        cells = format_cells(figures[ACCURACY], SHARE)
        lines.append([name, f"{content['pairs']:,}", *cells, margin])
    return align_columns(lines)


def format_bins(
    bins: Sequence[Mapping[str, Any]], label: str, template: str, *, has_confidence: bool = False
) -> str:
    """A table of bins that hold pairs; the mean confidence is shown where pairs are sorted by it."""
    lines = [[label, "pairs", *(["confidence"] if has_confidence else []), "accuracy", "95% interval"]]
    for one in bins:
        if one["pairs"]:
            low, high = (template.format(one[name]) if one[name] else "0" for name in ("low", "high"))
            span = low if low == high else f"{low} to {high}"
            mean = [SHARE.format(one["confidence"])] if has_confidence else []
            lines.append([span, f"{one['pairs']:,}", *mean, *format_cells(one["accuracy"], SHARE)])
    return align_columns(lines)


def format_answers(answers: Mapping[str, Any]) -> str:
    figures = dict(answers.get("figures", {}))
    rates = answers.get("win_rate", {})
    rows = [
        ("win rate at equal length", "length_controlled", SHARE),
        ("  win rate as it is", "raw", SHARE),
        ("  weight of length", "length_weight", NATS),
        ("KL of model and reference", "kl/samples", NATS),
        ("  by token (k3)", "kl/samples_k3", NATS),
        ("tokens of an answer", "length/samples", TOKENS),
    ]
    title = f"{answers['prompts']:,} prompts answered"
    if rates:
        others = "the chosen answers" if answers["against"] == "chosen" else "the reference's answers"
        title += f", and judged by {answers['judge']} against {others}"
    return f"{title}\n" + format_figures(figures | rates, rows)


def format_cells(figure: Mapping[str, float | None], template: str) -> list[str]:
    value, low, high = (figure[name] for name in ("value", "low", "high"))
    number = "-" if value is None else format_metric(template, value)
    if low is None or high is None:
        return [number, "-"]
    return [number, f"{format_metric(template, low)} to {format_metric(template, high)}"]
