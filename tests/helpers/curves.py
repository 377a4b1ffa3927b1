"""The figures of a run in tests: they are rendered only where a test looks at the picture or the page.

To render them takes as long as all the rest of a small run. To make them without takes a tenth, and is done
once for each log: those of most runs differ in their values alone.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from dpo_wrapper.data.whole_files import write_whole
from dpo_wrapper.evaluation.curves import format_curves, plot_curves
from dpo_wrapper.evaluation.report import Record
from dpo_wrapper.training import run_page
from dpo_wrapper.training.monitoring import figure

MADE: set[frozenset[object]] = set()
"""Logs whose figure this process has made: stages, parts and metrics, and how often each comes."""


def plot_unrendered(records: Sequence[Record], path: Path, title: str = "") -> None:
    from matplotlib.figure import Figure

    kinds = Counter(
        (record["stage"], record["part"], *(name for name, value in record.items() if value is not None))
        for record in records
    )
    if (log := frozenset(kinds.items())) in MADE:
        return write_whole(path, b"not rendered")
    with patch.object(Figure, "savefig", lambda self, file, **options: file.write(b"not rendered")):
        plot_curves(records, path, title)
    MADE.add(log)


@contextmanager
def unrendered_curves() -> Iterator[None]:
    """Runs inside do not render their curves, and their pages have none."""
    with (
        patch.object(figure, "plot_curves", plot_unrendered),
        patch.object(run_page, "format_curves", lambda records: []),
    ):
        yield


@contextmanager
def rendered_curves() -> Iterator[None]:
    """Runs inside do, as those of users."""
    with (
        patch.object(figure, "plot_curves", plot_curves),
        patch.object(run_page, "format_curves", format_curves),
    ):
        yield
