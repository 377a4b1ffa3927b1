"""The figures of a run in tests: they are rendered only where a test looks at the picture or the page.

To render them takes as long as all the rest of a small run.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from dpo_wrapper.evaluation.curves import format_curves, plot_curves
from dpo_wrapper.evaluation.report import Record
from dpo_wrapper.training import run_page
from dpo_wrapper.training.monitoring import figure


def plot_unrendered(records: Sequence[Record], path: Path, title: str = "") -> None:
    from matplotlib.figure import Figure

    with patch.object(Figure, "savefig", lambda self, file, **options: file.write(b"not rendered")):
        plot_curves(records, path, title)


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
