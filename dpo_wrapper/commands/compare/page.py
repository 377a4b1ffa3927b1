"""report.html of a comparison."""

from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

from dpo_wrapper.commands.compare.config import Comparison
from dpo_wrapper.commands.compare.figures import (
    choose_colours,
    format_curve_figures,
    format_estimate,
    format_interval_figure,
)
from dpo_wrapper.commands.compare.results import MetricResult, RunResult
from dpo_wrapper.display import (
    Section,
    format_answers,
    format_code,
    format_note,
    format_page,
    format_scrolled,
    format_settings,
    format_table,
)
from dpo_wrapper.evaluation.samples import select_last_samples
from dpo_wrapper.training.config import flag
from dpo_wrapper.training.monitoring.report_line import format_duration
from dpo_wrapper.training.run_page import list_settings
from dpo_wrapper.training.run_summary import hide_paths, name_data

SEEDS_NOTE = (
    "A large dot is the mean over all seeds and pairs, its line the 95% interval; small dots are the seeds."
)


def format_comparison_page(
    comparison: Comparison,
    seeds: Sequence[int],
    results: Sequence[RunResult],
    estimates: Sequence[MetricResult],
    conclusions: Sequence[str],
    failures: Mapping[str, str],
) -> str:
    """The page as HTML: what the numbers support first, then the numbers."""
    names = [one.name for one in comparison.contestants]
    colours = choose_colours(names)
    config = comparison.contestants[0].config
    common, different = compare_settings(comparison, results)
    settings = {
        "model": hide_paths(config.model),
        "data": ", ".join(name_data(config)),
        "seeds": ", ".join(map(str, seeds)),
        "eval pairs": f"{len(results[0].scores):,}",
        **common,
    }
    support = "".join(f"<p>{escape(one)}</p>" for one in conclusions)
    notes = [format_note(f"{name} failed", sentence, is_problem=True) for name, sentence in failures.items()]
    again = f"dpo-wrapper train recipes/{results[0].run.recipe_file.name} --out elsewhere"
    sections = [
        Section("support", "What the numbers support", support),
        Section("failed", "Runs that failed", "\n".join(notes)),
        Section("results", "Results", format_results(estimates, colours)),
        Section("curves", "While they trained", format_grid(format_curve_figures(results, colours))),
        Section("samples", "Samples", format_samples(results)),
        Section("costs", "Time and memory", format_costs(names, results)),
        Section("settings", "What differs", format_differences(names, different)),
        Section("again", "A run again", format_code(again)),
    ]
    title = f"{', '.join(names[:-1])} and {names[-1]} compared"
    return format_page(title, format_settings(settings), [one for one in sections if one.content])


def format_results(estimates: Sequence[MetricResult], colours: Mapping[str, str]) -> str:
    """Figures of the means with intervals, the same as a table, and differences to the highest mean."""
    if not estimates:
        return ""
    figures = [
        format_interval_figure(number, one.metric, one.means, one.tables, colours)
        for number, one in enumerate(estimates)
    ]
    head = ["", *(one.metric.name for one in estimates)]
    lines = [
        [
            name,
            *(
                format_estimate(one.metric, one.means[name]) if name in one.means else "-"
                for one in estimates
            ),
        ]
        for name in colours
    ]
    table = format_table(head, lines, caption="Means with 95% intervals")
    differences = [
        [
            name,
            *(
                format_estimate(one.metric, one.differences[name])
                if name in one.differences
                else "highest"
                if name in one.means
                else "-"
                for one in estimates
            ),
        ]
        for name in colours
    ]
    other = format_table(
        head, differences, caption="Differences to the highest mean, pair by pair and seed by seed"
    )
    return (
        f"{format_grid(figures)}\n<p>{SEEDS_NOTE}</p>\n{format_scrolled(table, 'Means with intervals')}\n"
        f"{format_scrolled(other, 'Differences')}"
    )


def format_grid(figures: Sequence[str]) -> str:
    return f'<div class="figures">{"".join(figures)}</div>' if figures else ""


def format_samples(results: Sequence[RunResult]) -> str:
    """What each contestant answers, of the first seed whose run is there, beside reference and chosen."""
    last: dict[str, dict[str, Mapping[str, Any]]] = {}
    for result in results:
        samples = select_last_samples(result.samples, "dpo")
        if samples:
            last.setdefault(result.run.contestant.name, {one["prompt"]: one for one in samples})
    if not last:
        return ""
    rows = []
    for number, prompt in enumerate(next(iter(last.values())), start=1):
        written = {name: of_run[prompt] for name, of_run in last.items() if prompt in of_run}
        references = [one["reference"] for one in written.values() if one["reference"] is not None]
        answers = {"reference": next(iter(references), None)}
        answers |= {name: one["policy"] for name, one in written.items()}
        first = next(iter(written.values()))
        answers["chosen, in the data"] = first["chosen"]
        rows.append(format_answers(f"Prompt {number}", first["readable_prompt"], answers))
    return "\n".join(rows)


def format_costs(names: Sequence[str], results: Sequence[RunResult]) -> str:
    lines = []
    for name in names:
        of_name = [one for one in results if one.run.contestant.name == name]
        if of_name:
            duration = format_duration(fmean(one.seconds for one in of_name))
            lines.append([name, duration, f"{max(one.memory for one in of_name):.2f} GB", str(len(of_name))])
    head = ["", "time of a run", "memory", "runs"]
    return format_scrolled(format_table(head, lines, caption="Means over seeds; of memory the most"), "Costs")


def compare_settings(
    comparison: Comparison, results: Sequence[RunResult]
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Settings that all contestants have in common; and of the others the value of each contestant."""
    configs = {one.name: one.config for one in comparison.contestants}
    first = next(iter(configs.values()))
    names = [name for name in vars(first) if len({str(getattr(one, name)) for one in configs.values()}) > 1]
    options = {flag(name): {key: str(getattr(one, name)) for key, one in configs.items()} for name in names}
    schedules = list_schedules(results)
    different = {label: values for label, values in schedules.items() if len(set(values.values())) > 1}
    common = {
        label: next(iter(values.values())) for label, values in schedules.items() if label not in different
    }
    shown = {name.replace("_", " ") for name in (*names, "data", "seed")}
    others = list_settings(first, has_loss="loss" not in names)
    return common | {name: value for name, value in others.items() if name not in shown}, different | options


def list_schedules(results: Sequence[RunResult]) -> dict[str, dict[str, str]]:
    """Steps and peak learning rate of each stage, of each contestant; several where its seeds differ."""
    found: dict[str, dict[str, dict[str, None]]] = {}
    for result in results:
        steps = [one for one in result.log if one["part"] == "step"]
        for stage in dict.fromkeys(one["stage"] for one in steps):
            of_stage = [one for one in steps if one["stage"] == stage]
            values = {
                f"{stage} steps": f"{of_stage[-1]['step']:,}",
                f"{stage} peak learning rate": f"{max(one['lr'] for one in of_stage):.2g}",
            }
            for label, value in values.items():
                found.setdefault(label, {}).setdefault(result.run.contestant.name, {})[value] = None
    return {
        label: {name: ", ".join(values) for name, values in of_label.items()}
        for label, of_label in found.items()
    }


def format_differences(names: Sequence[str], different: Mapping[str, Mapping[str, str]]) -> str:
    """The settings that are not the same for all contestants."""
    lines = [[name, *(values.get(name, "-") for values in different.values())] for name in names]
    return format_scrolled(format_table(["", *different], lines), "Settings that differ")
