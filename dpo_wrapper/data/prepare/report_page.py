"""report.html: what was prepared, what is wrong with it, and rows as the model sees them."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from dpo_wrapper.data.examples import TokenizedExample
from dpo_wrapper.data.lint.features import DATASET_TYPES, SPLITS
from dpo_wrapper.data.lint.findings import FeatureMap, Finding
from dpo_wrapper.data.prepare.length_figures import draw_lengths
from dpo_wrapper.data.prepared import format_option
from dpo_wrapper.data.preview import decode_runs, name_completions
from dpo_wrapper.data.tokens.tokenizers import Tokenizer

MAX_TOKENS = 600
"""Tokens that are shown of a prompt (its last ones) and of a completion (its first ones)."""

MAX_FILES = 4
"""Names of files that the page shows."""


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
    page = PAGE.substitute(
        title=escape(f"{len(features['label']):,} rows prepared"),
        settings=format_settings(manifest),
        counts=format_table(("rows", "number"), list_counts(manifest["counts"]), has_total=True),
        types=format_table(("type", "rows", "train", "test", "tokens"), list_types(features)),
        num_problems=len(problems),
        problems=format_findings_with_rows(problems, examples, tokenizer) or "<p>None was found.</p>",
        notes=format_findings_with_rows(notes, examples, tokenizer),
        figures="\n".join(draw_lengths(features)),
        sample="\n".join(format_row(row, examples[row], tokenizer) for row in sample),
    )
    Path(path).write_text(page, encoding="utf-8")


def format_settings(manifest: Mapping[str, Any]) -> str:
    """What was prepared, and all options that are set."""
    files = [file["name"] for file in manifest["input"]["files"]]
    more = f" and {len(files) - MAX_FILES:,} more" if len(files) > MAX_FILES else ""
    settings = {
        "data": ", ".join(files[:MAX_FILES]) + more,
        "tokenizer": manifest["tokenizer"]["name"],
        **manifest["options"],
    }
    return "".join(
        f"<div><dt>{name.replace('_', ' ')}</dt><dd>{escape(format_option(value))}</dd></div>"
        for name, value in settings.items()
        if value not in (None, False, [])
    )


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


def format_table(head: Sequence[str], lines: Iterable[Sequence[str | int]], has_total: bool = False) -> str:
    """A table of a label and numbers; the last line may be a total."""
    body = []
    for label, *numbers in lines:
        cells = "".join(f"<td>{number:,}</td>" for number in numbers)
        body.append(f'<tr><th scope="row">{escape(str(label))}</th>{cells}</tr>')
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    name = ' class="total"' if has_total else ""
    return f"<table{name}><thead><tr>{columns}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def format_findings_with_rows(
    findings: Sequence[Finding], examples: Mapping[int, TokenizedExample], tokenizer: Tokenizer
) -> str:
    """The findings as articles, each with those of its rows that are in `examples`."""
    articles = []
    for finding in findings:
        rows = "".join(format_row(row, examples[row], tokenizer) for row in finding.rows if row in examples)
        details = f"<details><summary>Rows that show it</summary>{rows}</details>" if rows else ""
        kind = "problem" if finding.is_problem else "note"
        title = escape(finding.name.replace("_", " "))
        articles.append(
            f'<article class="{kind}"><h3>{title}</h3><p>{escape(finding.sentence)}</p>{details}</article>'
        )
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


PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { --text: #1d2329; --soft: #56606b; --page: #fff; --box: #f4f6f8; --line: #d3d9df;
  --problem: #b3261e; --note: #2c5f9e; --scored: #cfeed4; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e8ec; --soft: #a3adb8; --page: #14181c; --box: #1e242a; --line: #3a434c;
    --problem: #ff9c92; --note: #8fbdf5; --scored: #1f4f2e; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2rem; } h3 { font-size: 1rem; margin: 0; }
h4 { font-size: .85rem; font-weight: 600; color: var(--soft); margin: 0 0 .25rem; overflow-wrap: anywhere; }
p { margin: .25rem 0; }
.settings { display: flex; flex-wrap: wrap; gap: .25rem 2rem; margin: 0; }
.settings div { display: flex; gap: .5rem; } .settings dt { color: var(--soft); }
.settings dd { margin: 0; overflow-wrap: anywhere; }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 3rem; margin-top: 1rem; align-items: flex-start;
  overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .15rem .4rem; font-weight: 400; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; padding-left: 0; } thead th { color: var(--soft); }
.total tbody tr:last-child > * { font-weight: 600; border-bottom: 0; }
article { background: var(--box); border-left: .3rem solid var(--note); border-radius: .3rem;
  padding: .6rem .9rem; margin: .6rem 0; }
.problem { border-color: var(--problem); }
.problem h3 { color: var(--problem); } .note h3 { color: var(--note); }
summary { cursor: pointer; padding: .25rem 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; }
.row { border: 1px solid var(--line); border-radius: .3rem; background: var(--page); padding: .6rem .8rem;
  margin: .6rem 0; }
.row dl { margin: 0; } .row dt { color: var(--soft); font-size: .85rem; }
.row dd { margin: 0 0 .4rem; font: .85rem/1.5 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 20rem; overflow-y: auto; }
mark { background: var(--scored); color: inherit; border-radius: .15rem; }
.special { color: var(--note); font-style: normal; }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<dl class="settings">$settings</dl>
<div class="tables">$counts$types</div>
</header>
<main>
<section aria-labelledby="problems"><h2 id="problems">Problems ($num_problems)</h2>
$problems
</section>
<section aria-labelledby="notes"><h2 id="notes">Notes</h2>
$notes
</section>
<section aria-labelledby="lengths"><h2 id="lengths">Lengths</h2>
<div class="figures">
$figures
</div>
</section>
<section aria-labelledby="sample"><h2 id="sample">Rows as the model sees them</h2>
<p><mark>Marked</mark> tokens are scored; <i class="special">special tokens</i> are in another colour.</p>
$sample
</section>
</main>
</body>
</html>
""")
