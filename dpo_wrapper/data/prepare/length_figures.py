"""Histograms of lengths, as figures of a page."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_wrapper.data.lint.findings import FeatureMap
from dpo_wrapper.display import format_figure
from dpo_wrapper.display.figures import COLOURS

NUM_BINS = 40


def draw_lengths(features: FeatureMap) -> Iterator[str]:
    """Figures of the lengths of prompts and completions, and of their difference, as HTML."""
    is_list = features["num_completions"] > 1
    chosen, rejected = (features[f"{side}_length"] for side in ("chosen", "rejected"))
    completions = {"chosen": chosen[is_list], "rejected": rejected[is_list]}
    if len(is_list):
        yield draw_histogram("prompt", "tokens of a prompt", {"prompts": features["prompt_length"]})
    if is_list.any():
        yield draw_histogram("completion", "tokens of a completion", completions)
        difference = {"chosen − rejected": chosen[is_list] - rejected[is_list]}
        yield draw_histogram("difference", "chosen − rejected, tokens", difference)
    if not is_list.all():
        yield draw_histogram("single", "tokens of a single completion", {"completions": chosen[~is_list]})


def draw_histogram(name: str, title: str, series: Mapping[str, NDArray[Any]]) -> str:
    """A histogram of one or two series as a figure; what is beyond 99 % is in the outermost bars."""
    values = np.concatenate(list(series.values()))
    low, high = np.percentile(values, (0.5, 99.5))
    edges = np.linspace(np.floor(min(low, 0)), max(np.ceil(high), 1), NUM_BINS + 1)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for (label, part), colour in zip(series.items(), COLOURS, strict=False):
            heights, _ = np.histogram(np.clip(part, edges[0], edges[-1]), edges)
            axes.stairs(heights, edges, fill=True, color=colour, alpha=0.45)
            axes.stairs(heights, edges, color=colour, label=label)
        axes.set(xlabel=title, ylabel="rows")
        if len(series) > 1:
            axes.legend()

    captions = [
        f"{label} {part.min():,} to {part.max():,}, median {np.median(part):,.0f}, mean {part.mean():,.1f}"
        for label, part in series.items()
    ]
    caption = "; ".join(captions) + "."
    return format_figure(name, draw, label=f"Histogram of {title}. {caption}", caption=caption)
