"""Figures of a comparison: intervals beside each other, and curves over each other."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from dpo_wrapper.commands.compare.intervals import Table
from dpo_wrapper.commands.compare.results import Metric, RunResult
from dpo_wrapper.commands.evaluate.conclusions import format_interval
from dpo_wrapper.display import format_figure
from dpo_wrapper.evaluation.statistics.bootstrap import Estimate

COLOURS = ("#3b82c4", "#d9762b", "#3d9970", "#b0569b", "#8a7f2d", "#6b6fd0", "#c4504f", "#4f9aa8")
"""Of the contestants; all read on white and on near black."""

CURVES = (
    ("rewards/accuracies", "reward accuracy on eval pairs"),
    ("logps/chosen", "log-prob of chosen, nats an answer"),
    ("logps/rejected", "log-prob of rejected, nats an answer"),
)
"""Metrics that all losses have, whatever their rewards."""


def choose_colours(names: Sequence[str]) -> dict[str, str]:
    return {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(names)}


def format_interval_figure(
    number: int,
    metric: Metric,
    means: Mapping[str, Estimate],
    tables: Mapping[str, Table],
    colours: Mapping[str, str],
) -> str:
    """The means of a metric with their intervals, and small dots for the seeds, as HTML."""
    seed_means = {name: np.nanmean(table, axis=1) for name, table in tables.items()}
    label = "; ".join(f"{name} {format_estimate(metric, one)}" for name, one in means.items())
    return format_figure(
        f"interval{number}",
        partial(draw_intervals, metric=metric, means=means, seed_means=seed_means, colours=colours),
        label=f"{metric.name}: {label}.",
        caption=metric.meaning,
        size=(4.6, 0.8 + 0.34 * len(means)),
    )


def format_estimate(metric: Metric, estimate: Estimate) -> str:
    """A value with its interval, as in 71.2% (65.0% to 77.1%)."""
    return format_interval(estimate.as_dict(), metric.template)


def draw_intervals(
    figure: Any,
    metric: Metric,
    means: Mapping[str, Estimate],
    seed_means: Mapping[str, Any],
    colours: Mapping[str, str],
) -> None:
    axes = figure.subplots()
    names = list(means)[::-1]
    for place, name in enumerate(names):
        estimate, colour = means[name], colours[name]
        if estimate.bounds is not None:
            axes.plot(estimate.bounds, [place, place], color=colour, lw=2.2, solid_capstyle="round")
        axes.plot(
            seed_means[name], [place - 0.22] * len(seed_means[name]), ".", color=colour, ms=4, alpha=0.6
        )
        axes.plot([estimate.value], [place], "o", color=colour, ms=6)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_title(metric.name, loc="left", fontsize=9.5)
    axes.xaxis.set_major_formatter(lambda value, _: metric.template.replace(".1%", ".0%").format(value))
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="x", alpha=0.25)


def format_curve_figures(results: Sequence[RunResult], colours: Mapping[str, str]) -> list[str]:
    """For each of the metrics the means over seeds of all contestants as lines, and each run faintly."""
    figures = []
    for number, (name, label) in enumerate(CURVES):
        curves = collect_curves(results, name)
        if curves:
            ends = "; ".join(
                f"{one} ends at {steps[max(steps)].mean():.3g}" for one, steps in mean_curves(curves).items()
            )
            draw = partial(draw_curves, curves=curves, label=label, colours=colours)
            figures.append(
                format_figure(f"curve{number}", draw, label=f"{label} over steps: {ends}.", size=(4.6, 3.0))
            )
    return figures


Curve = dict[int, float]
"""A value for each step that was evaluated."""


def collect_curves(results: Sequence[RunResult], name: str) -> dict[str, list[Curve]]:
    """The curves of a metric of each contestant, one for each seed."""
    curves: dict[str, list[Curve]] = {}
    for result in results:
        curve = {one["step"]: one[name] for one in result.evaluations if one.get(name) is not None}
        if len(curve) > 1:
            curves.setdefault(result.run.contestant.name, []).append(curve)
    return curves


def mean_curves(curves: Mapping[str, Sequence[Curve]]) -> dict[str, dict[int, Any]]:
    """Of each contestant the values of all seeds at the steps that all of them have."""
    return {
        name: {
            step: np.array([one[step] for one in of_seeds])
            for step in sorted(set.intersection(*(set(one) for one in of_seeds)))
        }
        for name, of_seeds in curves.items()
    }


def draw_curves(
    figure: Any, curves: Mapping[str, Sequence[Curve]], label: str, colours: Mapping[str, str]
) -> None:
    axes = figure.subplots()
    for name, steps in mean_curves(curves).items():
        for curve in curves[name]:
            axes.plot(list(curve), list(curve.values()), color=colours[name], alpha=0.25, lw=0.8)
        means = [values.mean() for values in steps.values()]
        axes.plot(list(steps), means, "o-", color=colours[name], ms=3, lw=1.6, label=name)
    axes.set(xlabel="step", title=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.title.set(fontsize=9.5, ha="left", x=0.0)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
