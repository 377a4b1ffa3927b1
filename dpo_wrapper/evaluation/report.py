"""What a person reads of a run: curves, a table of metrics, and completions of one prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dpo_wrapper.data import TokenizedExample, Tokenizer
from dpo_wrapper.evaluation.generate import generate
from dpo_wrapper.metrics import format_metric

Record = dict[str, Any]

MAX_COMPLETION_TOKENS = 120

MAX_OPENING_TOKENS = 24
"""Tokens of a text without a prompt that a model is given to continue."""

PANELS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("loss", "loss (nats)", ("loss",)),
    ("reward accuracy", "fraction", ("rewards/accuracies",)),
    ("reward margin", "chosen − rejected (nats)", ("rewards/margins",)),
    ("rewards", "nats, as the loss scales them", ("rewards/chosen", "rewards/rejected")),
    ("log-prob of chosen", "nats per completion", ("logps/chosen", "logps/ref_chosen")),
    ("log-prob of rejected", "nats per completion", ("logps/rejected", "logps/ref_rejected")),
)
"""Title, unit and metrics of each plot."""

TABLE_ROWS = (
    ("reward accuracy", "rewards/accuracies", "{:.1%}"),
    ("reward margin", "rewards/margins", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
    ("log-prob of chosen", "logps/chosen", "{:.2f}"),
    ("log-prob of rejected", "logps/rejected", "{:.2f}"),
    ("pairs", "pairs/valid", "{:.0f}"),
    ("lists", "lists/valid", "{:.0f}"),
    ("rows", "rows/valid", "{:.0f}"),
)
"""Label, metric and format of each row of the table."""


def select_records(records: Sequence[Record], part: str) -> list[Record]:
    """The records of one part: step, eval or train."""
    return [record for record in records if record["part"] == part]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values."""
    windows = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [sum(part) / len(part) for part in windows]


def plot_curves(records: Sequence[Record], path: Path) -> None:
    """Plot a stage of training: smoothed metrics of the steps as lines, eval metrics as dots.

    Args:
        records: of the stage.
        path: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    step_records, eval_records = select_records(records, "step"), select_records(records, "eval")
    window = max(1, len(step_records) // 25)
    names = {name for record in records for name in record}
    panels = [panel for panel in PANELS if not names.isdisjoint(panel[2])] or [*PANELS[:1]]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 + 3 * columns, 3.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, unit, metrics) in zip(
        figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False
    ):
        for color, metric in zip(("C0", "C1"), metrics, strict=False):
            prefix = f"{metric.split('/')[-1]}, " if len(metrics) > 1 else ""
            steps, values = extract_curve(step_records, metric)
            values = smooth(values, window)
            axes.plot(steps, values, color=color, alpha=0.55, lw=1.4, label=f"{prefix}train")
            axes.plot(*extract_curve(eval_records, metric), "o-", color=color, ms=4, label=f"{prefix}eval")
        if title == "reward accuracy":
            axes.set_ylim(0, 1.03)
        axes.set(title=title, ylabel=unit, xlabel="step")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, framealpha=0.6)
    figure.savefig(path, dpi=110)


def extract_curve(records: Sequence[Record], metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have a metric; a value that was not finite is None."""
    records = [record for record in records if record.get(metric) is not None]
    return [record["step"] for record in records], [record[metric] for record in records]


def format_before_and_after(records: Sequence[Record]) -> str:
    """A table of the eval and train metrics before and after a stage of training, from its records."""
    columns: list[tuple[str, Record]] = []
    for part in ("eval", "train"):
        if selected := select_records(records, part):
            columns += [(f"{part} before", selected[0]), ("after", selected[-1])]
    rows = [["", *(heading for heading, _ in columns)]]
    for label, metric, template in TABLE_ROWS:
        if any(metric in record for _, record in columns):
            values = [record.get(metric) for _, record in columns]
            rows.append(
                [label, *("-" if value is None else format_metric(template, value) for value in values)]
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for label, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *padded]).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def format_completions(
    tokenizer: Tokenizer,
    models: Mapping[str, nn.Module | None],
    example: TokenizedExample,
    max_positions: int | None = None,
) -> str:
    """A prompt, the greedy completion of each model that is not None, and the chosen completion.

    Of an example without a prompt the first tokens are one.
    """
    end_ids = (tokenizer.end_of_turn_id, tokenizer.eos_id)
    ids = [*example.prompt, *(example.sft_completion or ())]
    num_prompt = len(example.prompt)
    if num_prompt < 2:  # nothing but a BOS
        num_prompt = min(MAX_OPENING_TOKENS, (len(ids) + 1) // 2)
    prompt_ids, best_ids = ids[:num_prompt], ids[num_prompt:]
    lines = [("prompt", shorten(tokenizer.decode(prompt_ids), keep_end=True))]
    for name, model in models.items():
        if model is not None:
            generated = generate(model, prompt_ids, MAX_COMPLETION_TOKENS, end_ids, max_positions)
            lines.append((name, shorten(tokenizer.decode(generated))))
    is_preference = len(example.completions) > 1 or example.label is not None
    lines.append(("chosen" if is_preference else "data", shorten(tokenizer.decode(best_ids))))
    return "\n".join(f"{name:9}  {text}" for name, text in lines)


def shorten(text: str, max_chars: int = 300, *, keep_end: bool = False) -> str:
    """The text on one line; of a long text the beginning, or the end."""
    line = " ".join(text.split())
    if len(line) <= max_chars:
        return line
    return f"…{line[-max_chars:]}" if keep_end else f"{line[:max_chars]}…"
