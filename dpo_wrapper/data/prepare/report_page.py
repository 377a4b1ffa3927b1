"""report.html: what was prepared, what is wrong with it, and rows as the model sees them."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dpo_wrapper.data.examples import TokenizedExample
from dpo_wrapper.data.lint.features import DATASET_TYPES, SPLITS
from dpo_wrapper.data.lint.findings import FeatureMap, Finding
from dpo_wrapper.data.prepare.length_figures import draw_lengths
from dpo_wrapper.data.prepared import format_option
from dpo_wrapper.data.preview import decode_runs, name_completions
from dpo_wrapper.data.tokens.tokenizers import Tokenizer
from dpo_wrapper.display import Section, format_note, format_page, format_settings, format_table

MAX_TOKENS = 600
"""Tokens that are shown of a prompt (its last ones) and of a completion (its first ones)."""

MAX_FILES = 4
"""Names of files that the page shows."""

STYLE = """\
:root { --scored: #cfeed4; }
@media (prefers-color-scheme: dark) { :root { --scored: #1f4f2e; } }
mark { background: var(--scored); color: inherit; border-radius: .15rem; }
.special { color: var(--note); font-style: normal; }
"""

LEGEND = """\
<p><mark>Marked</mark> tokens are scored; <i class="special">special tokens</i> are in another colour.</p>
"""


def write_report(
    path: str | Path,
    manifest: Mapping[str, Any],
    findings: Sequence[Finding],
    features: FeatureMap,
    examples: Mapping[int, TokenizedExample],
    tokenizer: Tokenizer,
) -> None:
    """Write a page that needs no other file and no network.

    Args:
        path: of the page.
        manifest: that of `PreparedData`, of which counts, input, tokenizer and options are shown.
        findings: of `find_problems`.
        features: of `measure_rows`.
        examples: rows to show, by their index: those that findings name are shown with them, others as a
            sample.
        tokenizer: of the examples.
    """
    named = {row for finding in findings for row in finding.rows}
    problems, notes = ([f for f in findings if f.is_problem == is_problem] for is_problem in (True, False))
    sample = [row for row in sorted(examples) if row not in named]
    counts = format_table(("rows", "number"), list_counts(manifest["counts"]), has_total=True)
    types = format_table(("type", "rows", "train", "test", "tokens"), list_types(features))
    figures = "\n".join(draw_lengths(features))
    rows = "\n".join(format_row(row, examples[row], tokenizer) for row in sample)
    found = format_findings_with_rows(problems, examples, tokenizer) or "<p>None was found.</p>"
    sections = [
        Section("problems", f"Problems ({len(problems)})", found),
        Section("notes", "Notes", format_findings_with_rows(notes, examples, tokenizer)),
        Section("lengths", "Lengths", f'<div class="figures">\n{figures}\n</div>'),
        Section("sample", "Rows as the model sees them", LEGEND + rows),
    ]
    header = f'{format_settings(list_settings(manifest))}\n<div class="tables">{counts}{types}</div>'
    page = format_page(f"{len(features['label']):,} rows prepared", header, sections, STYLE)
    Path(path).write_text(page, encoding="utf-8")


def list_settings(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What was prepared, and all options that are set."""
    files = [file["name"] for file in manifest["input"]["files"]]
    more = f" and {len(files) - MAX_FILES:,} more" if len(files) > MAX_FILES else ""
    settings = {
        "data": ", ".join(files[:MAX_FILES]) + more,
        "tokenizer": manifest["tokenizer"]["name"],
        **manifest["options"],
    }
    return {
        name.replace("_", " "): format_option(value)
        for name, value in settings.items()
        if value not in (None, False, [])
    }


def list_counts(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """What became of the rows that were read, and their sum."""
    names = {"written": "written", "refused": "refused", "duplicates": "duplicates, left out"}
    return [*((label, counts[name]) for name, label in names.items()), ("read", counts["read"])]


def list_types(features: FeatureMap) -> list[tuple[str, int, int, int, int]]:
    """Rows and tokens of each dataset type."""
    is_test = features["split"] == SPLITS.index("test")
    lines = []
    for index in np.unique(features["dataset_type"]):
        is_type = features["dataset_type"] == index
        number, num_test = int(is_type.sum()), int((is_type & is_test).sum())
        tokens = int(features["num_tokens"][is_type].sum(dtype=np.int64))
        lines.append((DATASET_TYPES[index].replace("_", " "), number, number - num_test, num_test, tokens))
    return lines


def format_findings_with_rows(
    findings: Sequence[Finding], examples: Mapping[int, TokenizedExample], tokenizer: Tokenizer
) -> str:
    """The findings as articles, each with those of its rows that are in `examples`."""
    articles = []
    for finding in findings:
        rows = "".join(format_row(row, examples[row], tokenizer) for row in finding.rows if row in examples)
        details = f"<details><summary>Rows that show it</summary>{rows}</details>" if rows else ""
        title = finding.name.replace("_", " ")
        articles.append(format_note(title, finding.sentence, details, is_problem=finding.is_problem))
    return "\n".join(articles)


def format_row(index: int, example: TokenizedExample, tokenizer: Tokenizer) -> str:
    """One row as the model sees it: prompt and completions, of which scored tokens are marked."""
    count, masks = len(example.prompt), example.scored_masks()
    hidden = max(0, count - MAX_TOKENS)
    prompt = example.prompt[hidden:]
    text = mark_tokens(tokenizer, prompt, masks[0][hidden:count], example.prompt[:hidden])
    parts = [("prompt", "… " * bool(hidden) + text)] if prompt else []
    for name, ids, mask in zip(name_completions(example), example.completions, masks, strict=True):
        text = mark_tokens(tokenizer, ids[:MAX_TOKENS], mask[count:], example.prompt)
        parts.append((name, text + " …" * (len(ids) > MAX_TOKENS)))
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{text}</dd>" for name, text in parts)
    title = f"row {index:,}" + f", {escape(example.source)}" * bool(example.source)
    return f'<div class="row"><h4>{title}</h4><dl>{lines}</dl></div>'


def mark_tokens(
    tokenizer: Tokenizer, ids: Sequence[int], scored: Sequence[bool], before: Sequence[int]
) -> str:
    """The text of ids as HTML, scored ones and special tokens marked."""
    special = {
        id_
        for id_ in set(ids)
        if not tokenizer.decode([id_]) and tokenizer.decode([id_], skip_special_tokens=False)
    }
    keys = [(is_scored, id_ in special) for id_, is_scored in zip(ids, scored, strict=False)]
    parts = []
    for text, (is_scored, is_special) in decode_runs(tokenizer, ids, keys, before):
        text = f'<i class="special">{escape(text)}</i>' if is_special else escape(text)
        parts.append(f"<mark>{text}</mark>" if is_scored else text)
    return "".join(parts)
