"""What the runs of a comparison have logged and scored."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dpo_wrapper.commands.compare.intervals import CrossedBootstrap, Table
from dpo_wrapper.commands.compare.runs import ComparedRun
from dpo_wrapper.commands.evaluate.run_evaluation import EVALUATION_FILE, SAMPLES_FILE, SCORES_FILE
from dpo_wrapper.evaluation.statistics.bootstrap import Estimate
from dpo_wrapper.training.files import read_json_lines
from dpo_wrapper.training.metrics_log import MetricsLog

Record = dict[str, Any]


@dataclass(frozen=True)
class RunResult:
    """What a finished run has left.

    Attributes:
        log: lines of metrics.jsonl.
        scores: of each eval pair, lines of scores.jsonl of `dpo-wrapper evaluate`.
        answers: to eval prompts, with a judge's scores; empty without a judge.
        samples: of the run's own samples.jsonl.
        notes: sentences of `dpo-wrapper evaluate` on the eval rows.
    """

    run: ComparedRun
    log: list[Record]
    scores: list[Record]
    answers: list[Record]
    samples: list[Record]
    notes: Sequence[str] = ()

    @classmethod
    def read(cls, run: ComparedRun) -> "RunResult":
        """The result of a run that is trained and evaluated."""
        return cls(
            run,
            MetricsLog(run.folder / "metrics.jsonl").read(),
            read_json_lines(run.evaluation / SCORES_FILE),
            read_json_lines(run.evaluation / SAMPLES_FILE),
            read_json_lines(run.folder / "samples.jsonl"),
            json.loads((run.evaluation / EVALUATION_FILE).read_text(encoding="utf-8"))["notes"],
        )

    @property
    def evaluations(self) -> list[Record]:
        """The log's lines on eval rows in preference training."""
        return [one for one in self.log if one["stage"] == "dpo" and one["part"] == "eval"]

    @property
    def seconds(self) -> float:
        """How long the run took, without interruptions."""
        return self.log[-1]["elapsed_seconds"]

    @property
    def memory(self) -> float:
        """The most memory that it held, in GB."""
        return max(one["memory_gb"] for one in self.log if "memory_gb" in one)


def keep_shared_prompts(results: Sequence[RunResult]) -> list[RunResult]:
    """The results on the prompts that all runs were evaluated on.

    A run leaves out those that the model was trained on before, where contestants begin with other models.

    Raises:
        ValueError: there is no such prompt.
    """
    kept = {}
    for name in ("scores", "answers"):
        lines_of_runs = [getattr(one, name) for one in results]
        shared = set.intersection(*({line["prompt"] for line in lines} for lines in lines_of_runs))
        kept[name] = [[line for line in lines if line["prompt"] in shared] for lines in lines_of_runs]
    if not kept["scores"][0]:
        raise ValueError(
            "the contestants should have eval prompts in common that none was trained on, but there is none: "
            "give other rows as --eval-data."
        )
    parts = zip(results, kept["scores"], kept["answers"], strict=True)
    return [replace(one, scores=scores, answers=answers) for one, scores, answers in parts]


@dataclass(frozen=True)
class Metric:
    """What contestants are compared in.

    Attributes:
        name: in evaluations and pages.
        label: in a sentence.
        meaning: a sentence for those who do not know it.
        template: format of a value.
        read: the value of one line, of scores or of answers; None where it has none.
        is_of_answers: whether the lines are answers and not scores.
    """

    name: str
    label: str
    meaning: str
    template: str
    read: Callable[[Mapping[str, Any]], float | None]
    is_of_answers: bool = False

    @property
    def is_share(self) -> bool:
        return "%" in self.template

    def format(self, value: float) -> str:
        return self.template.format(value)


def read_change(record: Mapping[str, Any]) -> float | None:
    """How far the log-prob of chosen has moved from the reference's, in nats a token."""
    if "logps/ref_chosen" not in record:
        return None
    return (record["logps/chosen"] - record["logps/ref_chosen"]) / record["length/chosen"]


def read_preference_change(record: Mapping[str, Any]) -> float | None:
    """1 where chosen has gained on rejected, relative to the reference."""
    if "logps/ref_chosen" not in record:
        return None
    gains = [record[f"logps/{side}"] - record[f"logps/ref_{side}"] for side in ("chosen", "rejected")]
    return float(np.sign(gains[0] - gains[1]) + 1) / 2


def read_win(record: Mapping[str, Any]) -> float | None:
    """1 where the judge prefers the policy's answer, a half for a tie."""
    if "judge" not in record:
        return None
    policy, other = (record["judge"][name] for name in ("policy", *(record["judge"].keys() - {"policy"})))
    return float(np.sign(policy - other) + 1) / 2


METRICS = (
    Metric(
        "reward accuracy",
        "reward accuracy",
        "The share of eval pairs whose chosen answer has the larger reward, by the loss's own reward.",
        "{:.1%}",
        lambda record: record["rewards/accuracies"],
    ),
    Metric(
        "gain of chosen over rejected",
        "the share of pairs on which chosen gains",
        "The share of eval pairs whose chosen answer has gained on the rejected one since training began, in "
        "log-prob: the same measure for all losses.",
        "{:.1%}",
        read_preference_change,
    ),
    Metric(
        "change of chosen",
        "the change of the chosen answers' log-prob (nats a token)",
        "How much likelier chosen answers are than under the reference, in nats a token. Far below zero the "
        "policy gives up what it should learn; neither more nor less is better by itself.",
        "{:+.3g}",
        read_change,
    ),
    Metric(
        "win rate",
        "win rate",
        "The share of prompts whose answer by the policy the judge prefers to the other one.",
        "{:.1%}",
        read_win,
        is_of_answers=True,
    ),
)


def make_tables(results: Sequence[RunResult], metric: Metric, seeds: Sequence[int]) -> dict[str, Table]:
    """A table [seeds, pairs] of a metric for each contestant that has any value of it."""
    tables: dict[str, Table] = {}
    for result in results:
        lines = result.answers if metric.is_of_answers else result.scores
        values = [metric.read(line) for line in lines]
        known = [np.nan if value is None else value for value in values]
        if any(value is not None for value in values):
            name = result.run.contestant.name
            table = tables.setdefault(name, np.full((len(seeds), len(known)), np.nan))
            table[seeds.index(result.run.seed)] = known
    return tables


@dataclass(frozen=True)
class MetricResult:
    """The estimates of a metric.

    Attributes:
        tables: [seeds, pairs] of each contestant.
        means: of each contestant.
        differences: of each contestant to the one with the largest mean.
    """

    metric: Metric
    tables: dict[str, Table]
    means: dict[str, Estimate]
    differences: dict[str, Estimate]


def estimate_metrics(results: Sequence[RunResult], seeds: Sequence[int]) -> list[MetricResult]:
    """The estimates of all metrics that at least two contestants have."""
    estimates = []
    for metric in METRICS:
        tables = make_tables(results, metric, seeds)
        if len(tables) < 2:
            continue
        first = next(result for result in results if result.run.contestant.name in tables)
        lines = first.answers if metric.is_of_answers else first.scores
        bootstrap = CrossedBootstrap(len(seeds), [line["prompt"] for line in lines])
        means = {
            name: bootstrap.estimate_mean(table, is_share=metric.is_share) for name, table in tables.items()
        }
        best = max(means, key=lambda name: means[name].value or 0.0)
        differences = {
            name: bootstrap.estimate_difference(table, tables[best], is_share=metric.is_share)
            for name, table in tables.items()
            if name != best
        }
        estimates.append(MetricResult(metric, tables, means, differences))
    return estimates
