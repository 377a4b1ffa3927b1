"""The figure of a run in tests: it is made in full, but rendered only where a test looks at the picture.

To render it takes as long as all the rest of a small run.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from dpo_wrapper.evaluation.curves import plot_curves
from dpo_wrapper.evaluation.report import Record
from dpo_wrapper.training.monitoring import figure


def plot_unrendered(records: Sequence[Record], path: Path, title: str = "") -> None:
    from matplotlib.figure import Figure

    with patch.object(Figure, "savefig", lambda self, file, **options: file.write(b"not rendered")):
        plot_curves(records, path, title)


@contextmanager
def unrendered_curves() -> Iterator[None]:
    """Runs inside do not render their curves."""
    with patch.object(figure, "plot_curves", plot_unrendered):
        yield


@contextmanager
def rendered_curves() -> Iterator[None]:
    """Runs inside do, as those of users."""
    with patch.object(figure, "plot_curves", plot_curves):
        yield
