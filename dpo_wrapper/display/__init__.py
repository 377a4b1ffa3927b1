"""Pages that need no other file and no network: frame and style, tables, figures by matplotlib.

They follow the light or dark scheme of their reader, fit on a phone, and run no script.
"""

from dpo_wrapper.display.figures import format_figure
from dpo_wrapper.display.page import Section, format_page
from dpo_wrapper.display.parts import (
    format_answers,
    format_code,
    format_note,
    format_scrolled,
    format_settings,
    format_table,
)

__all__ = [
    "Section",
    "format_answers",
    "format_code",
    "format_figure",
    "format_note",
    "format_page",
    "format_scrolled",
    "format_settings",
    "format_table",
]
