"""The frame of a page: head, style, heading, and sections with headings of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from dpo_wrapper.display.style import STYLE


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        id: its name within the page, for links to it.
        title: its heading, as text.
        content: HTML.
    """

    id: str
    title: str
    content: str


def format_page(title: str, header: str, sections: Sequence[Section], style: str = "") -> str:
    """A whole page as HTML.

    Args:
        title: of the page, and its heading; text.
        header: HTML below the heading.
        sections: what follows, in this order.
        style: CSS beside that of all pages.
    """
    parts = [
        f'<section aria-labelledby="{one.id}"><h2 id="{one.id}">{escape(one.title)}</h2>\n'
        f"{one.content}\n</section>"
        for one in sections
    ]
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>
{STYLE}{style}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{header}
</header>
<main>
{body}
</main>
</body>
</html>
"""
