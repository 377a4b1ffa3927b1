"""Pages by themselves: whole, escaped, and in the colours of their reader."""

import pytest

from dpo_wrapper.display import (
    Section,
    format_code,
    format_figure,
    format_note,
    format_page,
    format_scrolled,
    format_settings,
    format_table,
)
from helpers.html_pages import Page, check_references

MARKUP = '<b id="x">&</b>'


def draw_line(figure):
    figure.subplots().plot([0, 1], [0, 1], label="line")


def test_a_page_has_sections_with_headings():
    figure = format_figure("one", draw_line, label="A line.", caption="It rises.")
    sections = [Section("first", "First", figure), Section("second", MARKUP, "<p>text</p>")]
    text = format_page("Title", "<p>header</p>", sections, ".own { color: red; }")
    check_references(text)
    page = Page(text)
    assert page.texts["h1"] == page.texts["title"] == ["Title"] and page.texts["h2"] == ["First", MARKUP]
    assert [value for name, value in page.attributes if name == "aria-labelledby"] == ["first", "second"]
    assert ".own { color: red; }" in text and "default-src 'none'" in text


def test_texts_are_escaped_in_every_part():
    parts = [
        format_settings({MARKUP: MARKUP}),
        format_table([MARKUP], [[MARKUP, MARKUP]], caption=MARKUP),
        format_note(MARKUP, MARKUP),
        format_code(MARKUP),
        format_scrolled("", MARKUP),
        format_figure("name", draw_line, label=MARKUP, caption=MARKUP),
    ]
    for part in parts:
        page = Page(part)
        assert "b" not in page.tags and not page.open, part


def test_a_table_names_its_rows_and_columns():
    page = Page(format_table(["rows", "number"], [["all", 1234], ["shown", "12 of them"]], has_total=True))
    assert page.texts["td"] == ["1,234", "12 of them"] and page.texts["th"] == [
        "rows",
        "number",
        "all",
        "shown",
    ]
    assert [value for name, value in page.attributes if name == "scope"] == ["col", "col", "row", "row"]


def test_two_figures_share_no_id():
    text = "".join(format_figure(name, draw_line, label="A line.") for name in ("one", "two"))
    ids = [value for name, value in Page(text).attributes if name == "id"]
    assert len(ids) == len(set(ids)) and all(value.startswith(("one-", "two-")) for value in ids)
    assert "currentColor" in text and "#010203" not in text


@pytest.mark.parametrize("number", [10, 20_000])
def test_a_curve_of_many_points_stays_small(number):
    def draw(figure):
        figure.subplots().plot(range(number), [k * 7919 % 1009 for k in range(number)])

    assert len(format_figure("curve", draw, label="A curve.")) < 80_000
