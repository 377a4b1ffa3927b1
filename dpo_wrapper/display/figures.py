"""Figures of matplotlib as SVG that a page holds in itself, in the page's colours."""

import io
import re
from collections.abc import Callable
from html import escape
from typing import Any

INK = "#010203"
"""Stands for the page's colour of text, and becomes `currentColor`."""

COLOURS = ("#3b82c4", "#d9762b")
"""Of a first and of a second series; both read on white and on near black."""

STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "page", "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "font.size": 9,
    "path.simplify_threshold": 0.5,  # pixels: curves of many steps are drawn by fewer points
}  # fmt: skip


def format_figure(
    name: str,
    draw: Callable[[Any], object],
    *,
    label: str,
    caption: str = "",
    size: tuple[float, float] = (4.2, 2.6),
) -> str:
    """A figure as HTML.

    Args:
        name: of letters, unlike those of other figures of the page.
        draw: draws into the `matplotlib.figure.Figure` that it is called with.
        label: what the figure shows, in words, for those who do not see it.
        caption: a text below it.
        size: width and height in inches. As wide as a phone, text of the font's 9 points is of its true size.
    """
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    picture = inline_svg(draw_svg(draw, size), name)
    return f'<figure><div role="img" aria-label="{escape(label)}">{picture}</div>{below}</figure>'


def draw_svg(draw: Callable[[Any], object], size: tuple[float, float]) -> str:
    """The SVG file of a figure."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def inline_svg(svg: str, name: str) -> str:
    """An SVG file as a part of a page: without its head, in the page's ink, with ids of its own."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
