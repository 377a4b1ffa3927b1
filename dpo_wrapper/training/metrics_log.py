"""The log of a run, metrics.jsonl: one line for each step and each evaluation."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpo_wrapper.training.files import read_json_lines


class MetricsLog:
    """The log in a file, which need not be there yet."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def append(self, stage: str, part: str, step: int, values: Mapping[str, float]) -> None:
        """Append one line; `part` is "step" for a training step, or the split evaluated on.

        A value that is not finite is written as null: JSON knows no NaN.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self.file.open("a", encoding="utf-8") as log:
            log.write(json.dumps({"stage": stage, "part": part, "step": step, **finite}) + "\n")

    def read(self) -> list[dict[str, Any]]:
        return read_json_lines(self.file)

    def count_bytes(self) -> int:
        return self.file.stat().st_size if self.file.exists() else 0

    def cut(self, num_bytes: int) -> int:
        """Leave the first bytes alone; returns how many of these are missing."""
        self.file.touch()
        num_missing = max(0, num_bytes - self.count_bytes())
        os.truncate(self.file, num_bytes - num_missing)
        return num_missing

    def cut_unfinished(self) -> None:
        """Take away what a run that was killed, or whose disk was full, had written of a line."""
        if self.file.exists():
            self.cut(self.file.read_bytes().rfind(b"\n") + 1)

    def set_aside(self) -> Path | None:
        """Begin an empty log, and keep what is logged in another file; returns its name, if it is needed."""
        numbered = (self.file.with_name(f"{self.file.stem}.{k}.jsonl") for k in range(1, 10**6))
        earlier = next(file for file in numbered if not file.exists())
        has_lines = self.count_bytes() > 0
        if has_lines:
            os.rename(self.file, earlier)
        self.file.touch()
        return earlier if has_lines else None

    def last_elapsed_seconds(self) -> float:
        """Time of the run when it logged its last line."""
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        for line in lines[-1:]:
            with suppress(ValueError):  # a line that was cut
                return float(json.loads(line).get("elapsed_seconds", 0.0))
        return 0.0
