"""report.html of a run: what was trained on what, how it went, and how to use it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from html import escape
from itertools import count
from typing import Any

from dpo_wrapper.data.whole_files import write_whole
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
from dpo_wrapper.evaluation.curves import STAGE_TITLES, format_curves
from dpo_wrapper.evaluation.report import Record, list_before_and_after, select_records
from dpo_wrapper.evaluation.samples import select_last_samples
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.files import read_json_lines
from dpo_wrapper.training.monitoring.report_line import format_duration
from dpo_wrapper.training.reference_words import describe_merging
from dpo_wrapper.training.run_record import CHANGEABLE_SETTINGS
from dpo_wrapper.training.run_summary import (
    describe_base,
    format_loading,
    hide_paths,
    list_stages,
    name_data,
)
from dpo_wrapper.training.setup import TrainSetup
from dpo_wrapper.version import __version__

MAIN_SETTINGS = ("loss", "max_length", "batch_size", "seed")
"""Settings that the page shows in any case."""

HIDDEN_SETTINGS = (*CHANGEABLE_SETTINGS, "data", "model", "eval_steps", "exact_answers")
"""Settings that it does not show among others: they do not change the model, or stand elsewhere."""

LOSS_NOTE = "The loss is in nats per token."
LOG_PROBS_NOTE = "Log-probs, rewards and margins are means over the examples, in nats."

STANDARD_ERRORS_NOTE = "Behind ± is the standard error, as that of a share of so many independent examples."

CURVES_KEY = (
    "<p>Lines are training steps, smoothed; dots are evaluations on examples that are not trained on. Values "
    "below a panel are the first and the last one.</p>"
)


def write_run_page(setup: TrainSetup, records: Sequence[Record]) -> None:
    """Write the page to the run folder; `records` are the lines of its log."""
    write_whole(setup.run.page_file, format_run_page(setup, records))


def format_run_page(setup: TrainSetup, records: Sequence[Record]) -> str:
    """The page as HTML."""
    run, config, plan = setup.run, setup.config, setup.stages[-1]
    has_loss = plan.name == "dpo"
    sentence = f"{describe_base(config).replace('`', '')}, trained with dpo-wrapper {__version__}."
    header = f"<p>{escape(sentence)}</p>\n{format_settings(list_settings(config, has_loss))}"
    of_stage = [record for record in records if record["stage"] == plan.name]
    last_samples = select_last_samples(run.read_samples(), plan.name)
    sections = [
        Section("trained", "What was trained on what", format_training(setup)),
        Section("results", f"Before and after {STAGE_TITLES[plan.name]}", format_results(of_stage)),
        Section("said", "What the run said", format_explanations(read_json_lines(run.explanations_file))),
        Section("curves", "Curves", format_figures(format_curves(records))),
        Section("samples", "Samples", "\n".join(map(format_sample, count(1), last_samples))),
        Section("costs", "Time, speed and memory", format_costs(setup, records)),
        Section("use", "How to use it", format_use(setup)),
    ]
    sections = [one for one in sections if one.content]
    return format_page(run.path.absolute().name, header, sections)


def list_settings(config: TrainConfig, has_loss: bool) -> dict[str, str]:
    """The data, the main settings, and all others that are not the default and change the result.

    `has_loss` says whether preferences are trained on, by the loss of the settings.
    """
    settings = asdict(config)
    defaults = {field.name: field.default for field in fields(config)}
    others = [
        name
        for name, value in settings.items()
        if value != defaults[name] and name not in (*HIDDEN_SETTINGS, *MAIN_SETTINGS)
    ]
    names = [name for name in (*MAIN_SETTINGS, *others) if has_loss or name != "loss"]
    values = {name: settings[name] for name in names}
    return {"data": ", ".join(name_data(config))} | {
        name.replace("_", " "): format_value(value) for name, value in values.items()
    }


def format_value(value: Any) -> str:
    """The value of an option in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_value, value))
    return hide_paths(str(value))


def format_training(setup: TrainSetup) -> str:
    """The stages with their data, the reference, and what became of rows that were not used as they are."""
    sentences = [setup.run.record.reference or "", *setup.notes]
    paragraphs = [f"<p>{escape(capitalize(hide_paths(one)))}</p>" for one in sentences if one]
    table = format_table(*list_stages(setup), caption="Stages, in their order")
    return "\n".join([format_scrolled(table, "Stages"), *paragraphs])


def capitalize(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def format_results(records: Sequence[Record]) -> str:
    """A table of the metrics of a stage at both of its ends, with standard errors where there are any."""
    headings, rows = list_before_and_after(records)
    lines: list[list[str]] = []
    for label, *values in rows:
        if label.strip() == "standard error":
            lines[-1][1:] = [
                value if error == "-" else f"{value} ± {error}"
                for value, error in zip(lines[-1][1:], values, strict=True)
            ]
        else:
            lines.append([label, *values])
    if not lines:
        return ""
    table = format_scrolled(format_table(["metric", *headings], lines), "Metrics before and after")
    notes = [LOG_PROBS_NOTE if len(lines) > 1 else LOSS_NOTE]
    notes += [STANDARD_ERRORS_NOTE] if len(lines) < len(rows) else []
    return f"{table}\n<p>{' '.join(notes)}</p>"


def format_explanations(lines: Iterable[Mapping[str, Any]]) -> str:
    """The sentences of explanations.jsonl."""
    notes = [
        format_note(f"{one['stage']}, step {one['step']}: {one['name']}", capitalize(one["text"]))
        for one in lines
    ]
    return "\n".join(notes) or "<p>Nothing: no metric was out of the ordinary.</p>"


def format_figures(figures: Sequence[str]) -> str:
    """The curves, and what their lines and dots are."""
    grid = "\n".join(figures)
    return f'{CURVES_KEY}\n<div class="figures">{grid}</div>' if figures else ""


def format_sample(number: int, sample: Mapping[str, Any]) -> str:
    """A prompt, and its completions side by side."""
    answers = {name: sample[name] for name in ("reference", "policy", "chosen")}
    return format_answers(f"Prompt {number}", sample["readable_prompt"], answers)


def format_costs(setup: TrainSetup, records: Sequence[Record]) -> str:
    """What each stage took."""
    stages = {plan.name: [one for one in records if one["stage"] == plan.name] for plan in setup.stages}
    costs = {
        plan.name: measure_costs(stages[plan.name], plan.splits.unit)
        for plan in setup.stages
        if select_records(stages[plan.name], "step")
    }
    if not costs:
        return ""
    labels = dict.fromkeys(label for cost in costs.values() for label in cost)
    rows = [[label, *(cost.get(label, "-") for cost in costs.values())] for label in labels]
    table = format_scrolled(format_table(["stage", *costs], rows), "Time, speed and memory of each stage")
    total = format_duration(records[-1]["elapsed_seconds"])
    machine = setup.run.record.machine
    place = f" on {machine}" if machine else ""
    return f"{table}\n<p>The whole run took {total}{escape(place)}, without interruptions.</p>"


def measure_costs(records: Sequence[Record], unit: str) -> dict[str, str]:
    """Time, speed and memory of a stage by what they are of; `unit` is that of its examples."""
    steps = select_records(records, "step")
    seconds = sum(one["seconds"] for one in steps)
    evaluations = sum(one["seconds"] for one in records if one["part"] != "step")

    def mean_rate(name: str) -> str:
        rate = sum(one[name] * one["seconds"] for one in steps) / seconds
        return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"

    return {
        "time of the steps": format_duration(seconds),
        "time of the evaluations": format_duration(evaluations),
        "examples a second": mean_rate(f"{unit}/second"),
        "tokens a second, shared prefixes once": mean_rate("unique_tokens/second"),
        "tokens a second, as padded rows": mean_rate("padded_tokens/second"),
        "most memory": f"{max(one['memory_gb'] for one in steps):.2f} GB",
    }


def format_use(setup: TrainSetup) -> str:
    """Commands and lines of Python for what the run has trained."""
    name, adapter = setup.run.path.absolute().name, setup.pretrained.adapter
    has_preferences = setup.stages[-1].name == "dpo"
    commands = [
        f"dpo-wrapper chat {name}",
        *([f"dpo-wrapper evaluate {name} --data OTHERS.jsonl"] if has_preferences else []),
        f"dpo-wrapper train --model {name} --data MORE.jsonl --out NEXT",
    ]
    merging = ""
    if adapter is not None:
        merging = f"<p>{escape(capitalize(hide_paths(describe_merging(adapter, setup.run.path))))}</p>"
    loading = format_loading(setup.pretrained, name, setup.config.max_length)
    parts = [
        f"<p>Beside the folder {escape(name)}, talk with the model, measure it, or train it further:</p>",
        format_code("\n".join(commands)),
        "<p>In Python:</p>",
        format_code(loading),
        merging,
    ]
    return "\n".join(parts)
