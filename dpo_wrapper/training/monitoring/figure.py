"""The figure of a run, drawn anew while the run goes on."""

import time
from pathlib import Path

from dpo_wrapper.evaluation.curves import plot_curves
from dpo_wrapper.training.run_folder import RunFolder

MAX_SHARE = 0.05
"""Fraction of the time that drawing may take while a run goes on."""


class Figure:
    """curves.png in the run folder."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.last_time, self.seconds = time.monotonic(), 1.0

    def draw(self) -> None:
        """Draw what is logged so far."""
        start = time.monotonic()
        settings = self.run.record.settings
        title = f"{self.run.path.absolute().name}: {Path(settings['model']).name}, {settings['loss']}"
        plot_curves(self.run.log.read(), self.run.path / "curves.png", title)
        self.last_time = time.monotonic()
        self.seconds = self.last_time - start

    def draw_if_cheap(self) -> None:
        """Draw, unless the last time was so recent that drawing would slow the run down."""
        if time.monotonic() - self.last_time > self.seconds / MAX_SHARE:
            self.draw()
