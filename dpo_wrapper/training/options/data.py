"""Options of what a run learns from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dpo_wrapper.data.config import DataConfig
from dpo_wrapper.training.options.base import Options


@dataclass(frozen=True, kw_only=True)
class DataOptions(DataConfig, Options):
    """What data to train and to evaluate on."""

    eval_data: tuple[Path, ...] | None = None
    """Preferences to evaluate on, as for --data. By default they are taken from --data: the rows whose column
    `split` says test or, if there is no such column, those of a fraction of the prompts."""
    eval_fraction: float = 0.1
    """Fraction of the rows to evaluate on, if no row has a split and --eval-data is not given; 0 for none."""
    split_seed: int | None = None
    """Seed of the choice of eval rows; by default --seed. Runs with different --seed have the same eval rows
    if this is the same."""
    ranking: Literal["all", "best"] | None = None
    """Which pairs a loss of pairs makes of a ranked list: all (the default), or the best completion with each
    of the others."""
    num_workers: int = 0
    """Number of processes that load batches; 0 loads them in the main process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.eval_data, (str, Path)):
            object.__setattr__(self, "eval_data", (Path(self.eval_data),))
        self.check("num_workers", lambda value: value >= 0, "0 or more")
        self.check("eval_fraction", lambda value: 0 <= value < 1, "in [0, 1)")
        self.check("max_length", lambda value: value >= 8, "at least 8")
        if set(self.eval_data or ()) & set(self.data):
            raise ValueError(
                "--eval-data should not be the same file as --data: leave it out to evaluate on a part of it."
            )
