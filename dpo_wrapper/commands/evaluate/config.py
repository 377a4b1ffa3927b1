"""Settings of `dpo-wrapper evaluate`. The command line is generated from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dpo_wrapper.commands.loading_options import LoadingOptions
from dpo_wrapper.data.config import DataConfig, flag

DEFAULT_SAMPLES = 100
"""Prompts that are answered where a judge is named and no number of them."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DataConfig, LoadingOptions):
    """Say how well a model tells chosen from rejected answers, how sure that is, and how far it has moved.

    Options of tokens that are left at their defaults (max-length, as-chat and so on) are those of the run.

    Raises:
        ValueError: an option has a value that cannot be, or options contradict each other.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run folder, the folder of an adapter, or a Hugging Face model by folder or name."""
    reference: str | None = None
    """What the model is compared with, named alike, or none. By default what the run began from; a model that
    is no run has none."""
    loss: str | None = None
    """The loss whose rewards are reported, as for dpo-wrapper train. By default that of the run, and
    sigmoid(beta=0.1) otherwise; without a reference the log-prob per token is the reward."""
    out: Path | None = None
    """Folder for evaluation.json (all figures), scores.jsonl (those of each pair) and samples.jsonl. Without
    it nothing is written."""
    judge: str | None = None
    """What says whose answers are better, those of the model or the others (--against): a function of prompt
    and answer like rules.py:score, a reward model by folder or name, or implicit:RUN."""
    against: Literal["reference", "chosen"] | None = None
    """The other answers: those of the reference, or the chosen ones of the data. By default those of the
    reference if there is one."""
    num_samples: int | None = None
    """Number of prompts that the model answers, for the judge and to estimate its KL divergence from the
    reference. By default 100 with a judge, and none without."""
    temperature: float = 1.0
    """Temperature of the answers; 0 for greedy ones. At 1 they estimate the KL divergence."""
    max_new_tokens: int = 256
    """Maximum length of an answer in tokens."""
    resamples: int = 2000
    """Number of resamples of the bootstrap, whose intervals hold the true figure with 95% confidence."""
    seed: int = 0
    """Seed of the resamples and of the answers."""
    micro_batch_tokens: int = 16384
    """Number of tokens that go through the model at once, shared prefixes counted once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least = {"num_samples": 1, "max_new_tokens": 1, "resamples": 100, "seed": 0}
        for name, least in (at_least | {"micro_batch_tokens": 1}).items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{flag(name)} should be at least {least}, but it is {value}: raise it.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"--temperature should be 0 or more, but it is {self.temperature}: give another value."
            )
        if self.against is not None and self.judge is None:
            raise ValueError(
                "--against should be given together with --judge, but that is missing: give both, or neither."
            )
        if self.sample_count and self.out is None:
            name = "judge" if self.judge is not None else "num_samples"
            raise ValueError(
                f"{flag(name)} should be given together with --out, but that is missing: name a folder for "
                "the answers."
            )
        for name in ("temperature", "max_new_tokens"):
            if not self.sample_count and getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"{flag(name)} is of the answers to prompts, but none are asked for: give --judge or "
                    "--num-samples too."
                )

    @property
    def sample_count(self) -> int:
        """Number of prompts that are answered, at most."""
        if self.num_samples is None:
            return DEFAULT_SAMPLES if self.judge is not None else 0
        return self.num_samples
