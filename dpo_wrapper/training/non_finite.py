"""Steps whose loss or gradients are not finite, which `--on-nan` stops or skips."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dpo_wrapper.training.stopping import TrainingError

MAX_SKIPPED_IN_A_ROW = 10
"""Skipped steps in a row that stop a run: what is wrong is the model, and no longer a row."""
MAX_PRINTED = 3
"""Skipped steps of a stage that are printed."""
MAX_SOURCES = 3
"""Rows of a step that are named."""


class NonFiniteSteps:
    """What becomes of the steps of a stage whose loss or norm of the gradients is not finite.

    All processes are asked with the same values, and decide alike.

    Args:
        on_nan: "stop" or "skip", as `--on-nan`.
        stage: name of the stage.
        list_sources: the sources of the rows of a step, which counts from 1.
        print_line: prints a line, of the main process alone.

    Attributes:
        num_skipped: steps of the stage that were skipped.
        num_in_a_row: those since the last step that was not.
    """

    def __init__(
        self,
        on_nan: str,
        stage: str,
        list_sources: Callable[[int], Sequence[str]],
        print_line: Callable[[str], object],
    ) -> None:
        self.skips, self.stage = on_nan == "skip", stage
        self.list_sources, self.print_line = list_sources, print_line
        self.num_skipped = self.num_in_a_row = 0

    def read_records(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Go on counting after the steps that an earlier run has logged, in the order of the log."""
        for record in records:
            if record["stage"] == self.stage and record["part"] == "step":
                num_skipped = record.get("num_skipped", self.num_skipped)
                self.num_in_a_row = self.num_in_a_row + 1 if num_skipped > self.num_skipped else 0
                self.num_skipped = num_skipped

    def is_skipped(self, step: int, values: Mapping[str, float]) -> bool:
        """Whether a step should change nothing, since one of its values, by their names, is not finite.

        Raises:
            TrainingError: the run should stop.
        """
        wrong = next((name for name, value in values.items() if not math.isfinite(value)), None)
        if wrong is None:
            self.num_in_a_row = 0
            return False
        self.num_skipped += 1
        self.num_in_a_row += 1
        rows, value = describe_rows(self.list_sources(step)), values[wrong]
        if not self.skips:
            raise TrainingError(
                f"the {wrong} should be finite, but at step {step} of {self.stage} it is {value}: begin a "
                "new run with a lower learning rate or --max-grad-norm, look at the rows of this step "
                f"({rows}), or go on from the last checkpoint, which is whole, by --resume --on-nan skip."
            )
        if self.num_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"the {wrong} should be finite, but at step {step} of {self.stage} it is {value}, and "
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row are skipped for that: begin a new run with a lower "
                f"learning rate or --max-grad-norm, or look at the rows of these steps (the last: {rows})."
            )
        if self.num_skipped <= MAX_PRINTED:
            end = ". Later ones are counted in metrics.jsonl alone" if self.num_skipped == MAX_PRINTED else ""
            self.print_line(
                f"{self.stage}, step {step}: the {wrong} is {value}, so the step is skipped ({rows}){end}."
            )
        return True


def describe_rows(sources: Sequence[str]) -> str:
    """The first of some rows, and how many others there are."""
    named, others = list(sources[:MAX_SOURCES]), len(sources) - MAX_SOURCES
    return "; ".join(named) + (f" and {others} other{'s' * (others > 1)}" if others > 0 else "")
