"""A figure of what a run logged: all of its stages, training steps as lines and evaluations as dots."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from dpo_wrapper.data.whole_files import write_whole
from dpo_wrapper.display import format_figure
from dpo_wrapper.evaluation.report import Record, select_records

NUM_SMOOTHED = 25
"""A curve is a mean over the last steps, of which there are this many times as many."""


@dataclass(frozen=True)
class Series:
    """A metric in a panel."""

    label: str
    metric: str
    color: str
    is_dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """A plot of some metrics over the steps of a stage.

    Attributes:
        level: where a horizontal line says that nothing has changed.
        has_learning_rate: whether the learning rate is drawn too, with an axis of its own.
    """

    title: str
    unit: str
    series: tuple[Series, ...]
    level: float | None = None
    has_learning_rate: bool = False


BLUE, GREEN, RED, GREY = "#3b82c4", "#2ca02c", "#dd4b4b", "0.5"
"""Colours that read on white and on near black; grey is beside the curves."""

LOSS = Series("loss", "loss", BLUE)

PREFERENCE_PANELS = (
    Panel("reward accuracy", "fraction", (Series("accuracy", "rewards/accuracies", BLUE),), level=0.5),
    Panel(
        "reward margin", "chosen − rejected, nats", (Series("margin", "rewards/margins", BLUE),), level=0.0
    ),
    Panel(
        "rewards",
        "nats, as the loss scales them",
        (Series("chosen", "rewards/chosen", GREEN), Series("rejected", "rewards/rejected", RED)),
        level=0.0,
    ),
    Panel(
        "log-prob of chosen",
        "nats per completion",
        (Series("policy", "logps/chosen", GREEN), Series("reference", "logps/ref_chosen", GREY, True)),
    ),
    Panel(
        "log-prob of rejected",
        "nats per completion",
        (Series("policy", "logps/rejected", RED), Series("reference", "logps/ref_rejected", GREY, True)),
    ),
    Panel("gradient norm", "before clipping", (Series("norm", "grad_norm", BLUE),)),
)

STAGE_TITLES = {"pretrain": "pretraining", "sft": "supervised training", "dpo": "preference training"}


def plot_curves(records: Sequence[Record], path: Path, title: str = "") -> None:
    """Draw the figure and write it to a file, completely or not at all.

    Args:
        records: lines of the log, of all stages.
        path: of the picture, whose ending is its format.
        title: of the figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [*list_panels(records)]
    num_columns = min(3 if len(panels) <= 6 else 4, len(panels))
    num_rows = -(-len(panels) // num_columns)
    figure = Figure(figsize=(1 + 4.3 * num_columns, 0.9 + 3.3 * num_rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    all_axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axes, (panel, stage_records) in zip(all_axes, panels, strict=False):
        draw_panel(axes, panel, stage_records)
    for axes in all_axes[len(panels) :]:
        axes.remove()
    add_key(figure, records)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:], dpi=110)
    write_whole(path, picture.getvalue())


def format_curves(records: Sequence[Record]) -> list[str]:
    """The panels of `plot_curves`, each as a figure of a page."""
    return [
        format_panel(f"curve{number}", panel, of_stage)
        for number, (panel, of_stage) in enumerate(list_panels(records))
    ]


def format_panel(name: str, panel: Panel, records: Sequence[Record]) -> str:
    """A panel of a stage with its records, as a figure of a page; `name` as in `format_figure`."""
    changes = describe_changes(panel, records)
    stage = STAGE_TITLES[records[0]["stage"]]
    return format_figure(
        name,
        lambda figure: draw_panel(figure.subplots(), panel, records),
        label=f"Curve over the steps of {stage}: {panel.title}, {panel.unit}. {changes}",
        caption=changes,
        size=(4.7, 3.1),
    )


def describe_changes(panel: Panel, records: Sequence[Record]) -> str:
    """The first and the last value of each curve, from evaluations if there are any."""
    changes = []
    for series in panel.series:
        curves = [extract_curve(select_records(records, part), series.metric)[1] for part in ("eval", "step")]
        if values := next(filter(None, curves), None):
            changes.append(f"{series.label} from {values[0]:,.4g} to {values[-1]:,.4g}")
    return f"{'; '.join(changes)}." if changes else ""


def list_panels(records: Sequence[Record]) -> list[tuple[Panel, list[Record]]]:
    """The panels of each stage, with its records."""
    panels: list[tuple[Panel, list[Record]]] = []
    for stage in dict.fromkeys(record["stage"] for record in records):
        of_stage = [record for record in records if record["stage"] == stage]
        unit = "nats" if stage == "dpo" else "nats per token"
        panels.append((Panel(f"{STAGE_TITLES[stage]}: loss", unit, (LOSS,), None, True), of_stage))
        if stage == "dpo":
            names = {name for record in of_stage for name in record}
            panels += [(panel, of_stage) for panel in PREFERENCE_PANELS if panel.series[0].metric in names]
    return panels


def draw_panel(axes: Any, panel: Panel, records: Sequence[Record]) -> None:
    """Smoothed values of the steps as a line, all values faintly behind it, and evaluations as dots."""
    steps_done, evaluations = select_records(records, "step"), select_records(records, "eval")
    if panel.level is not None:
        axes.axhline(panel.level, color=GREY, lw=0.8)
    handles = []
    for series in panel.series:
        steps, values = extract_curve(steps_done, series.metric)
        window = max(1, len(values) // NUM_SMOOTHED)
        style = "--" if series.is_dashed else "-"
        if window > 1:
            axes.plot(steps, values, color=series.color, alpha=0.18, lw=0.8)
        (line,) = axes.plot(
            steps, smooth(values, window), style, color=series.color, alpha=0.9, lw=1.5, label=series.label
        )
        marks = {"mfc": "none"} if series.is_dashed else {}
        evaluated, dots = extract_curve(evaluations, series.metric)
        axes.plot(evaluated, dots, "o", color=series.color, ms=5, **marks)
        if values or dots:
            handles.append(line)
    axes.set(ylabel=panel.unit, xlabel="step")
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold")
    axes.grid(alpha=0.25)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if panel.unit == "fraction":
        axes.set_ylim(-0.03, 1.03)
    if panel.has_learning_rate:
        handles = draw_learning_rate(axes, steps_done)
    elif len(handles) == 1:
        handles = []  # the title says what it is
    if handles:
        axes.legend(
            handles=handles,
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            ncols=len(handles),
            fontsize=8.5,
            frameon=False,
            borderaxespad=0.2,
            handlelength=1.6,
            columnspacing=1.2,
        )


def draw_learning_rate(axes: Any, records: Sequence[Record]) -> list[Any]:
    """The learning rate behind the other curves, if there is one yet, with an axis on the right."""
    steps, rates = extract_curve(records, "lr")
    if not steps:
        return []
    right = axes.twinx()
    lines = right.plot(steps, rates, ":", color=GREY, lw=1.3, label="learning rate")
    right.set_ylim(bottom=0)
    right.locator_params(axis="y", nbins=5)
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.tick_params(axis="y", labelsize=8)
    right.set_zorder(axes.get_zorder() - 1)
    axes.patch.set_visible(False)
    return lines


def add_key(figure: Any, records: Sequence[Record]) -> None:
    """Say below the panels what lines and dots are, where there are any."""
    from matplotlib.lines import Line2D

    of_parts = {
        "step": Line2D([], [], color="0.2", lw=1.5, label="training steps, smoothed"),
        "eval": Line2D([], [], color="0.2", marker="o", ms=5, lw=0, label="evaluation"),
    }
    handles = [line for part, line in of_parts.items() if select_records(records, part)]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values."""
    sums = [0.0, *accumulate(values)]
    starts = [max(0, end - window) for end in range(len(sums))]
    return [(sums[end] - sums[starts[end]]) / (end - starts[end]) for end in range(1, len(sums))]


def extract_curve(records: Sequence[Record], metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have a metric; a value that was not finite is None."""
    records = [record for record in records if record.get(metric) is not None]
    return [record["step"] for record in records], [record[metric] for record in records]
