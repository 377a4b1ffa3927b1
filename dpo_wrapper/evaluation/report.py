"""From a run's metrics to something a person reads. No model code."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

PANELS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("loss", "loss (nats)", ("loss",)),
    ("reward accuracy", "share", ("rewards/accuracies",)),
    ("reward margin", "β·((p_w − r_w) − (p_l − r_l))", ("rewards/margins",)),
    ("rewards", "β·(policy − reference)", ("rewards/chosen", "rewards/rejected")),
    ("log-prob of chosen", "nats per completion", ("logps/chosen", "logps/ref_chosen")),
    ("log-prob of rejected", "nats per completion", ("logps/rejected", "logps/ref_rejected")),
)


def smoothed(values: Sequence[float], span: int) -> list[float]:
    """Mean over the last `span` values."""
    return [sum(part := values[max(0, k + 1 - span) : k + 1]) / len(part) for k in range(len(values))]


def plot_curves(records: Sequence[Record], path: Path) -> None:
    """Draw preference training: each step's metrics, smoothed, as lines, held-out values as dots on lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [r for r in records if r["stage"] == "dpo" and r["part"] == "step"]
    held_out = [r for r in records if r["stage"] == "dpo" and r["part"] == "held-out"]
    span = max(1, len(steps) // 25)
    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, unit, names) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for color, name in zip(("C0", "C1"), names, strict=False):
            label = name.split("/")[-1] if len(names) > 1 else "training"
            drawn = [r for r in steps if name in r]
            values = smoothed([r[name] for r in drawn], span)
            axes.plot([r["step"] for r in drawn], values, color=color, alpha=0.55, lw=1.4, label=label)
            drawn = [r for r in held_out if name in r]
            label = f"{label}, held out" if len(names) > 1 else "held out"
            axes.plot(
                [r["step"] for r in drawn], [r[name] for r in drawn], "o-", color=color, ms=4, label=label
            )
        if title == "reward accuracy":
            axes.set_ylim(0, 1.03)
        axes.set(title=title, ylabel=unit, xlabel="step")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, framealpha=0.6)
    figure.savefig(path, dpi=110)


TABLE = (
    ("reward accuracy", "rewards/accuracies", "{:.1%}"),
    ("reward margin", "rewards/margins", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
    ("log-prob of chosen", "logps/chosen", "{:.2f}"),
    ("log-prob of rejected", "logps/rejected", "{:.2f}"),
    ("pairs", "pairs/valid", "{:.0f}"),
    ("lists", "lists/valid", "{:.0f}"),
    ("rows", "rows/valid", "{:.0f}"),
)


def summary_table(columns: Sequence[tuple[str, Record]]) -> str:
    """A plain-text table with one column for each (heading, metrics)."""
    rows = [["", *(heading for heading, _ in columns)]]
    for label, name, form in TABLE:
        if not any(name in r for _, r in columns):
            continue
        rows.append([label, *(form.format(r[name]) if name in r else "-" for _, r in columns)])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *rest = (
            cell.ljust(w) if k == 0 else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
