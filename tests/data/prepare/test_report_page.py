"""report.html: what a person reads of prepared data, also in a browser."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dpo_wrapper.data import ByteTokenizer, Example
from dpo_wrapper.data.lint import find_problems, measure_rows
from dpo_wrapper.data.prepare.report_page import MAX_TOKENS, write_report
from helpers.browser import check_page, needs_browser, open_page, take_picture
from helpers.html_pages import Page, check_references
from helpers.lint_rows import label_rows, make_pairs, tokenize

SCRIPT = "<script>document.title = 'changed'</script> & </style></body>"
COUNTS = {"read": 69, "written": 62, "refused": 3, "duplicates": 4}
MANIFEST = {
    "counts": COUNTS,
    "input": {"files": [{"name": "a<b>.jsonl"}]},
    "tokenizer": {"name": "bytes"},
    "options": {"max_length": 512, "kind": None, "columns": []},
}


def write_page(
    path: Path, examples: Sequence[Example], manifest: Mapping[str, Any] = MANIFEST, step: int = 20
) -> str:
    tokenized = [tokenize(example) for example in examples]
    features = measure_rows([(row, (tokens,)) for row, tokens in zip(examples, tokenized, strict=True)])
    findings = find_problems(features, manifest.get("counts", {}))
    named = {row for finding in findings for row in finding.rows}
    shown = {row: tokenized[row] for row in sorted(named | set(range(0, len(examples), step)))}
    write_report(path, manifest, findings, features, shown, ByteTokenizer())
    return path.read_text(encoding="utf-8")


def make_examples() -> list[Example]:
    """Sixty pairs, of which one repeats and one holds HTML, and a list."""
    pairs = make_pairs(60)
    pairs[20] = Example(f"Is {SCRIPT} safe?", ("Yes.", f"{SCRIPT}"), source="a<b>.jsonl, line 21")
    return [*pairs, pairs[3], Example("Rank.", ("a", "b", "c"), split="test")]


def test_page_is_whole_and_refers_to_nothing(tmp_path: Path) -> None:
    text = write_page(tmp_path / "report.html", make_examples())
    page = Page(text)
    check_references(text)
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert len(labels) == page.tags.count("svg") == 3 and all("median" in label for label in labels)
    assert "currentColor" in text and "#010203" not in text  # what is drawn follows the page's colours
    assert page.texts["h1"] == ["62 rows prepared"]
    assert write_page(tmp_path / "again.html", make_examples()) == text


def test_texts_of_the_data_stay_texts(tmp_path: Path) -> None:
    page = Page(write_page(tmp_path / "report.html", make_examples()))
    assert f"Is {SCRIPT} safe?" in page.texts["dd"]
    assert SCRIPT in page.texts["mark"]
    assert "row 20, a<b>.jsonl, line 21" in page.texts["h4"]
    pairs = [row.completions for row in make_pairs(50)]
    opened = [Example(f"Q{k}", (f"<b>Yes {pair[0]}", pair[1])) for k, pair in enumerate(pairs)]
    page = Page(write_page(tmp_path / "opened.html", opened))
    assert any(text.startswith("“<b>Yes” begins 100.0% of chosen") for text in page.texts["p"])
    assert page.tags.count("style") == 1 + page.tags.count("svg")


def test_counts_add_up(tmp_path: Path) -> None:
    def read_numbers(manifest: Mapping[str, Any]) -> list[int]:
        page = Page(write_page(tmp_path / "report.html", make_examples(), manifest))
        return [int(cell.replace(",", "")) for cell in page.texts["td"]]

    numbers = read_numbers(MANIFEST)
    assert numbers[:4] == [62, 3, 4, 69] and sum(numbers[:3]) == numbers[3]
    assert numbers[4:7] == [61, 61, 0] and numbers[8:11] == [1, 0, 1]  # rows, train, test of pairs and lists


def test_problems_come_before_notes_with_their_rows(tmp_path: Path) -> None:
    page = Page(write_page(tmp_path / "report.html", make_examples()))
    assert page.texts["h2"] == ["Problems (2)", "Notes", "Lengths", "Rows as the model sees them"]
    assert page.texts["h3"] == ["duplicates", "few rows", "length bias", "left out", "prefix sharing"]
    assert page.texts["h4"] == ["row 60", "row 61", "row 0", "row 20, a<b>.jsonl, line 21", "row 40"]
    clean = Page(write_page(tmp_path / "clean.html", make_pairs(50)))
    assert clean.texts["h2"][0] == "Problems (0)" and "None was found." in clean.texts["p"]


def test_the_settings_are_shown(tmp_path: Path) -> None:
    files = {"files": [{"name": f"{k}.jsonl"} for k in range(6)]}
    options = {"max_length": 512, "kind": None, "dedupe": False, "columns": ["prompt=q", "chosen=a"]}
    manifest = MANIFEST | {"input": files, "tokenizer": {"name": "org/<model>"}, "options": options}
    page = Page(write_page(tmp_path / "report.html", make_pairs(3), manifest))
    assert page.texts["dt"][:4] == ["data", "tokenizer", "max length", "columns"]
    shown = ["0.jsonl, 1.jsonl, 2.jsonl, 3.jsonl and 2 more", "org/<model>", "512", "prompt=q, chosen=a"]
    assert page.texts["dd"][:4] == shown


def test_scored_tokens_and_special_tokens_are_marked(tmp_path: Path) -> None:
    text = write_page(tmp_path / "report.html", [Example("2 + 2?", ("4", "5"))])
    assert '<dt>prompt</dt><dd><i class="special">&lt;bos&gt;</i>2 + 2?</dd>' in text
    end = '<mark><i class="special">&lt;eos&gt;</i></mark>'
    assert f"<dt>chosen</dt><dd><mark>4</mark>{end}</dd>" in text
    assert f"<dt>rejected</dt><dd><mark>5</mark>{end}</dd>" in text


def test_long_rows_are_shortened_towards_the_border(tmp_path: Path) -> None:
    example = Example("a" * MAX_TOKENS + "b", ("c" * MAX_TOKENS + "d", "e"))
    text = write_page(tmp_path / "report.html", [example])
    assert f"<dd>… {'a' * (MAX_TOKENS - 1)}b</dd>" in text
    assert f"<dd><mark>{'c' * MAX_TOKENS}</mark> …</dd>" in text


def test_rows_of_every_type_are_drawn(tmp_path: Path) -> None:
    document = Example("", ("A long text.",), is_document=True)
    for examples, names in (
        (label_rows(make_pairs(2), 1), ["prompt", "desirable", "prompt", "undesirable"]),
        ([document], ["text"]),
        ([Example("Q", ("a",))], ["prompt", "completion"]),
        ([], []),
    ):
        page = Page(write_page(tmp_path / "report.html", examples, step=1))
        assert page.texts["dt"][3:] == names  # below three settings, each row once
        assert page.tags.count("figure") == (2 if examples else 0)
        assert not page.open


@pytest.mark.slow
@needs_browser
def test_page_in_a_browser(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_page(path, make_examples())
    result = open_page(path, "--dump-dom")
    page = Page(result.stdout)
    assert "CONSOLE" not in result.stderr  # what the page's security policy refuses is an error there
    assert page.texts["title"] == page.texts["h1"] == ["62 rows prepared"]
    assert "script" not in page.tags and SCRIPT in page.texts["mark"]
    assert page.texts["h2"][0] == "Problems (2)" and page.tags.count("svg") == 3
    check_page(path)
    pixels = take_picture(path, tmp_path / "dark.png", 390, 2000, is_dark=True)
    assert pixels.mean() < 0.3 and pixels.std() > 0.03  # something is drawn
