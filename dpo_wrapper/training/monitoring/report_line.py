"""The lines that a run prints after some of its steps, and after each evaluation."""

import math
from collections.abc import Mapping

from dpo_wrapper.metrics import format_metric

METRIC_FORMATS = (
    ("loss", "loss", "{:.4f}", 6),
    ("accuracy", "rewards/accuracies", "{:.0%}", 4),
    ("margin", "rewards/margins", "{:.3f}", 6),
    ("chosen", "kl/chosen", "{:.2f}", 6),
    ("exact answers", "exact_answers", "{:.0%}", 4),
)
"""Label, metric, format and least width of parts of both lines. `kl/chosen` is the change of the log-prob."""


def format_step_line(
    stage: str, step: int, num_steps: int, metrics: Mapping[str, float], seconds_left: float
) -> str:
    """What the steps since the last line did: their metrics, speed and memory, and the time that is left."""
    unique, padded = metrics["unique_tokens/second"], metrics["padded_tokens/second"]
    speed = f"{unique:>6,.0f} tokens/s (padded {padded:,.0f})"
    memory = f"{metrics['memory_gb']:.1f} GB"
    left = f"{format_duration(seconds_left)} left"
    return "  ".join([format_place(stage, step, num_steps), *format_metrics(metrics), speed, memory, left])


def format_evaluation_line(
    stage: str, step: int, num_steps: int, metrics: Mapping[str, float], where: str, seconds: float
) -> str:
    """What an evaluation found; `where` says on what, such as 40 eval pairs."""
    took = f"(on {where}, {seconds:,.1f} s)"
    return "  ".join([format_place(stage, step, num_steps), *format_metrics(metrics), took])


def count_examples(count: int, unit: str) -> str:
    """'1 pair', '2,000 pairs'."""
    return f"{count:,} {unit.removesuffix('s') if count == 1 else unit}"


def format_place(stage: str, step: int, num_steps: int) -> str:
    return f"{stage} {step:{len(str(num_steps))}}/{num_steps}"


def format_metrics(metrics: Mapping[str, float]) -> list[str]:
    """The metrics that there are, with labels; of supervised training the perplexity too."""
    parts = [
        f"{label} {format_metric(template, metrics[name]):>{width}}"
        for label, name, template, width in METRIC_FORMATS
        if name in metrics
    ]
    if "kl/chosen" not in metrics and "logps/chosen" in metrics:
        parts.append(f"log-prob of chosen {metrics['logps/chosen']:.2f}")
    if "rewards/accuracies" not in metrics and metrics["loss"] < 20:
        parts.append(f"perplexity {math.exp(metrics['loss']):<6,.4g}")
    return parts


def format_duration(seconds: float) -> str:
    """Minutes and seconds, as 4:10, or hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
