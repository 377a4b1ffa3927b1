"""Settings of `dpo-wrapper prepare`. The command line is generated from them."""

from dataclasses import dataclass
from datetime import date
from pathlib import Path

from dpo_wrapper.data.config import DataConfig
from dpo_wrapper.data.tokens.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(DataConfig):
    """Tokenize data once, check it, and write it to a folder for training; or show how it will be trained."""

    out: Path | None = None
    """Folder for the prepared data, which training maps into memory: Arrow files, manifest.json,
    refused.jsonl and report.html. Without it nothing is written, and examples are shown."""
    preview: int | None = None
    """Number of examples to show as the model sees them; by default 3 without --out, and none with it."""
    dedupe: bool = False
    """Leave out rows that equal an earlier one in prompt, completions and label."""
    strict: bool = False
    """End with exit status 3 if something is wrong with the data."""
    workers: int | None = None
    """Number of worker processes; by default one for each core."""

    def load_tokenizer(self, today: date) -> Tokenizer:
        """The tokenizer that is named, bytes by default; `today` is the date for templates that print one."""
        return load_tokenizer(self.tokenizer or "bytes", **self.tokenizer_options(today))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preview is not None and self.preview < 0:
            raise ValueError(f"--preview should be 0 or more, but it is {self.preview}.")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers should be at least 1, but it is {self.workers}.")
        for name in ("dedupe", "strict", "workers"):
            if self.out is None and getattr(self, name):
                raise ValueError(
                    f"--{name} should be given together with --out, but that is missing: name a folder."
                )
