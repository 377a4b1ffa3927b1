"""Run a comparison: train each contestant with each seed, evaluate the runs, and write their page."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dpo_wrapper.commands.compare.config import Comparison
from dpo_wrapper.commands.compare.page import format_comparison_page
from dpo_wrapper.commands.compare.results import (
    MetricResult,
    RunResult,
    estimate_metrics,
    keep_shared_prompts,
)
from dpo_wrapper.commands.compare.runs import ComparedRun, RunFailedError, evaluate_run, list_runs, train_run
from dpo_wrapper.commands.compare.words import draw_conclusions
from dpo_wrapper.commands.evaluate.eval_pairs import TRAINED_NOTE
from dpo_wrapper.data.whole_files import write_whole
from dpo_wrapper.data.writable import check_writable
from dpo_wrapper.display.terminal import print_line
from dpo_wrapper.training.monitoring.report_line import format_duration
from dpo_wrapper.training.run_record import CHANGEABLE_SETTINGS, format_setting

COMPARISON_FILE, PAGE_FILE = "comparison.json", "report.html"


def compare(comparison: Comparison) -> int:
    """Train and evaluate what is not there yet, one run after another; returns how many runs failed.

    The page is written anew whenever a seed of all contestants is done.

    Raises:
        ValueError: the folder holds another comparison, or all contestants refuse their options or data.
        KeyboardInterrupt: a signal came. The same command goes on from the last checkpoint.
    """
    open_folder(comparison)
    runs = list_runs(comparison)
    results: list[RunResult] = []
    failures: dict[str, str] = {}
    num_refused = 0
    for number, run in enumerate(runs, start=1):
        place = f"run {number} of {len(runs)}, {run.name}"
        try:
            complete_run(run, comparison, place)
        except RunFailedError as error:
            failures[run.name] = str(error)
            print_line(f"{place} failed: {error}")
            num_refused += error.status == 2
            if num_refused == number == len(comparison.contestants):
                raise ValueError(str(error)) from error
        else:
            results.append(RunResult.read(run))
        if number % len(comparison.contestants) == 0 and results:
            write_results(comparison, results, failures, is_last=number == len(runs))
    return len(failures)


def complete_run(run: ComparedRun, comparison: Comparison, place: str) -> None:
    """Train and evaluate a run, as far as that is not done yet."""
    if run.is_finished and run.is_evaluated:
        print_line(f"{place}: is done")
        return
    start = time.monotonic()
    if run.is_finished:
        print_line(f"{place}: is trained")
    else:
        print_line(f"{place}: trains; {run.log_file} tells how it goes")
        train_run(run)
    evaluate_run(run, comparison.judge, comparison.num_samples)
    print_line(f"{place}: done after {format_duration(time.monotonic() - start)}")


def write_results(
    comparison: Comparison, results: Sequence[RunResult], failures: Mapping[str, str], *, is_last: bool
) -> None:
    """Write comparison.json and the page; print what they say at the end."""
    results = keep_shared_prompts(results)
    seeds = [seed for seed in comparison.seeds if any(one.run.seed == seed for one in results)]
    estimates = estimate_metrics(results, seeds)
    conclusions = draw_conclusions(estimates, len(seeds), len(results[0].scores))
    names = dict.fromkeys(one.run.contestant.name for one in results if TRAINED_NOTE in one.notes)
    warning = (
        "was trained on all its eval pairs: its figures are not those of new ones (--eval-data names others)"
    )
    conclusions += [f"{name} {warning}." for name in names]
    content = describe_comparison(comparison) | {
        "results": {one.metric.name: describe_estimates(one) for one in estimates},
        "conclusions": conclusions,
        "failures": dict(failures),
    }
    write_content(comparison, content)
    page = format_comparison_page(comparison, seeds, results, estimates, conclusions, failures)
    write_whole(comparison.out / PAGE_FILE, page)
    if is_last:
        print_line("\n" + "\n".join(conclusions))
        print_line(f"\nThe page is {comparison.out / PAGE_FILE}")


def describe_estimates(result: MetricResult) -> dict[str, Any]:
    return {
        "means": {name: one.as_dict() for name, one in result.means.items()},
        "differences": {name: one.as_dict() for name, one in result.differences.items()},
    }


def open_folder(comparison: Comparison) -> None:
    """Note what is compared, or check that the folder holds this comparison.

    Contestants and seeds may be added to one, and left out.
    """
    file, content = comparison.out / COMPARISON_FILE, describe_comparison(comparison)
    check_writable(comparison.out)
    if file.is_file():
        changed = find_changes(json.loads(file.read_text(encoding="utf-8")), content)
        if changed:
            raise ValueError(
                f"the comparison in {comparison.out} should go on with the settings that it began with, but "
                f"it had {', '.join(changed)}: give the same, or name a new folder."
            )
    elif comparison.out.is_dir() and any(comparison.out.iterdir()):
        raise ValueError(
            "--out should be a new folder, an empty one or that of a comparison, but "
            f"{comparison.out} is not empty: name a new folder."
        )
    comparison.out.mkdir(parents=True, exist_ok=True)
    write_content(comparison, content)


def write_content(comparison: Comparison, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_whole(comparison.out / COMPARISON_FILE, text)


def describe_comparison(comparison: Comparison) -> dict[str, Any]:
    """What is compared, as JSON has it."""
    configs = {one.name: asdict(one.config) for one in comparison.contestants}
    return {
        "contestants": json.loads(json.dumps(configs, default=str)),
        "seeds": list(comparison.seeds),
        "judge": comparison.judge,
        "num_samples": comparison.num_samples,
    }


def find_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that were others before, of contestants that are there before and now."""
    pairs = [
        (old, now["contestants"][name])
        for name, old in before["contestants"].items()
        if name in now["contestants"]
    ]
    changed = [
        format_setting(option, old.get(option))
        for old, new in pairs
        for option, value in new.items()
        if option not in CHANGEABLE_SETTINGS and old.get(option) != value
    ]
    judged = [
        format_setting(name, before.get(name))
        for name in ("judge", "num_samples")
        if before.get(name) != now[name]
    ]
    return [*dict.fromkeys(changed + judged)]
