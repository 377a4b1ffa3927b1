"""Histograms of lengths as SVG that a page holds in itself."""

import io
import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_wrapper.data.lint.findings import FeatureMap

NUM_BINS = 40
INK = "#010203"
"""Stands for the page's colour of text, and becomes `currentColor`."""

COLOURS = ("#3b82c4", "#d9762b")
"""Of the first and of the second series; both read on white and on near black."""

STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "lengths", "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "font.size": 9,
}  # fmt: skip


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
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    values = np.concatenate(list(series.values()))
    low, high = np.percentile(values, (0.5, 99.5))
    edges = np.linspace(np.floor(min(low, 0)), max(np.ceil(high), 1), NUM_BINS + 1)
    with rc_context(STYLE):
        figure = Figure(figsize=(4.2, 2.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for (label, part), colour in zip(series.items(), COLOURS, strict=False):
            heights, _ = np.histogram(np.clip(part, edges[0], edges[-1]), edges)
            axes.stairs(heights, edges, fill=True, color=colour, alpha=0.45)
            axes.stairs(heights, edges, color=colour, label=label)
        axes.set(xlabel=title, ylabel="rows")
        if len(series) > 1:
            axes.legend()
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    captions = [
        f"{label} {part.min():,} to {part.max():,}, median {np.median(part):,.0f}, mean {part.mean():,.1f}"
        for label, part in series.items()
    ]
    caption = escape("; ".join(captions) + ".")
    return (
        f'<figure><div role="img" aria-label="Histogram of {escape(title)}. {caption}">'
        f"{inline_svg(file.getvalue(), name)}</div><figcaption>{caption}</figcaption></figure>"
    )


def inline_svg(svg: str, name: str) -> str:
    """An SVG file as a part of a page: without its head, in the page's ink, with ids of its own."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
