"""Parts of pages as HTML: settings, tables, notes, code. All arguments are text, which is escaped."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape


def format_settings(settings: Mapping[str, str]) -> str:
    """Names with their values, as many beside each other as there is room for."""
    pairs = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in settings.items()
    )
    return f'<dl class="settings">{"".join(pairs)}</dl>'


def format_table(
    head: Sequence[str],
    lines: Iterable[Sequence[str | int]],
    *,
    has_total: bool = False,
    caption: str | None = None,
) -> str:
    """A table of a label and of numbers or short texts in each line; the last line may be a total."""
    body = []
    for label, *values in lines:
        cells = "".join(f"<td>{format_cell(value)}</td>" for value in values)
        body.append(f'<tr><th scope="row">{escape(str(label))}</th>{cells}</tr>')
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    name = ' class="total"' if has_total else ""
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table{name}>{title}<thead><tr>{columns}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def format_cell(value: str | int) -> str:
    return escape(value) if isinstance(value, str) else f"{value:,}"


def format_note(title: str, sentence: str, details: str = "", *, is_problem: bool = False) -> str:
    """A box with a title, a sentence, and perhaps more HTML below it."""
    kind = "problem" if is_problem else "note"
    return f'<article class="{kind}"><h3>{escape(title)}</h3><p>{escape(sentence)}</p>{details}</article>'


def format_answers(title: str, prompt: str, answers: Mapping[str, str | None]) -> str:
    """A prompt, and answers to it by their names, side by side where there is room; None is left out."""
    sides = "".join(
        f"<div><dt>{escape(name)}</dt>{format_text(answer)}</div>"
        for name, answer in answers.items()
        if answer is not None
    )
    return (
        f'<div class="row"><h3>{escape(title)}</h3><dl><dt>prompt</dt>{format_text(prompt)}</dl>'
        f'<dl class="sides">{sides}</dl></div>'
    )


def format_text(text: str) -> str:
    """A text of a model or of the data, in the direction of its script."""
    if not text.strip():
        return '<dd class="missing">(empty)</dd>'
    return f'<dd dir="auto" tabindex="0">{escape(text)}</dd>'


def format_code(code: str) -> str:
    """Lines of a program or of a shell; long ones are scrolled, by the keyboard too."""
    return f'<pre tabindex="0"><code>{escape(code)}</code></pre>'


def format_scrolled(content: str, label: str) -> str:
    """HTML, such as a table, that is scrolled sideways where it is too wide, by the keyboard too."""
    return f'<div class="scrolled" role="region" aria-label="{escape(label)}" tabindex="0">{content}</div>'
