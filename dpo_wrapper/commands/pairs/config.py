"""Settings of `dpo-wrapper pairs`. The command line is generated from them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dpo_wrapper.commands.loading_options import LoadingOptions
from dpo_wrapper.data.config import DataConfig, flag
from dpo_wrapper.data.examples import DatasetType
from dpo_wrapper.data.tokens.encoded import Score
from dpo_wrapper.evaluation.sampling import Sampling

DEFAULT_NUM_SAMPLES = 4
"""Samples of a prompt that a judge compares."""

MAX_DEFAULT_NEW_TOKENS = 256
"""The longest answer in tokens where nothing is said of it."""


@dataclass(frozen=True, kw_only=True)
class PairsConfig(DataConfig, LoadingOptions):
    """Make preference pairs of logs: the recorded answer is chosen, one that a model samples is rejected.

    With --judge, several answers are sampled for each prompt, and the best of them is chosen over the worst.
    dpo-wrapper train --data takes the file. What was interrupted is continued by the same command. Options of
    tokens that are left at their defaults (max-length, as-chat and so on) are those of the run.
    """

    data: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="LOGS")]
    """Files of prompts with recorded answers, as dpo-wrapper train reads them: messages that end in an
    answer, prompt and completion, or preferences, whose chosen side is the recorded answer."""
    kind: DatasetType | None = field(default="prompt_completion", init=False)
    score: Score | None = field(default=None, init=False)
    out: Path
    """The .jsonl file to write. Until it is whole, what is done is in a file beside it that ends in
    .progress."""
    model: str
    """What answers are sampled from: a run folder, the folder of an adapter, or a Hugging Face model by its
    folder or name."""
    sample_from: Literal["policy", "reference"] = "policy"
    """policy: the model itself; reference: what its run began from, such as the model with its adapter
    off."""
    num_samples: int | None = None
    """Number of answers to sample for each prompt; by default 1, and 4 with --judge."""
    judge: str | None = None
    """What says how good an answer is: a function of prompt and answer (rules.py:score or
    package.module:score), a reward model of transformers by folder or name, or implicit:RUN, the implicit
    reward of a run and its reference. The recorded answers are not used then."""
    keep: Literal["pair", "list"] = "pair"
    """What becomes of the answers that the judge has ordered. pair: the best against the worst; list: all, as
    a ranked list."""
    max_new_tokens: int | None = None
    """Maximum length of a sampled answer in tokens; by default half of --max-length, and 256 at most. A
    prompt has the rest of --max-length, or --max-prompt-length."""
    temperature: float = 1.0
    """Divides the logits that are sampled from; 0 takes the most likely token each time."""
    top_p: float = 1.0
    """Sample from the fewest tokens whose probabilities add up to this."""
    top_k: int = 0
    """Sample from so many of the most likely tokens; 0 for all."""
    seed: int = 0
    """Seed of the samples."""
    batch_size: int = 16
    """Number of answers that are sampled at once."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("dpo-wrapper pairs should be given files of logs, but there are none: name one.")
        super().__post_init__()
        object.__setattr__(self, "out", Path(self.out))
        if self.out.suffix != ".jsonl":
            raise ValueError(
                f"--out should be a .jsonl file, but it is {self.out}: name it {self.out}.jsonl."
            )
        for name, value in (("max_new_tokens", self.answer_length), ("batch_size", self.batch_size)):
            if value < 1:
                raise ValueError(f"{flag(name)} should be at least 1, but it is {value}: give another value.")
        if self.answer_length >= self.max_length:
            raise ValueError(
                f"--max-new-tokens should leave room for a prompt in --max-length {self.max_length}, but it "
                f"is {self.answer_length}: raise --max-length."
            )
        self._check_samples()
        defaults = {"top_p": 1.0, "top_k": 0}
        if self.temperature == 0 and any(getattr(self, name) != value for name, value in defaults.items()):
            name = next(name for name, value in defaults.items() if getattr(self, name) != value)
            raise ValueError(
                f"{flag(name)} should be left out where --temperature is 0, but it is "
                f"{getattr(self, name)}: raise the temperature."
            )
        try:
            self.sampling  # noqa: B018  raises for settings that cannot be
        except ValueError as error:
            name, _, rest = str(error).partition(" ")
            raise ValueError(f"{flag(name)} {rest}") from error

    def _check_samples(self) -> None:
        if self.judge is None and self.keep == "list":
            raise ValueError(
                "--keep list should be given together with --judge, but that is missing: name what orders "
                "the answers."
            )
        if self.judge is None and self.num_samples not in (None, 1):
            raise ValueError(
                f"--num-samples should be 1 without --judge, but it is {self.num_samples}: name a judge that "
                "orders them."
            )
        if self.judge is not None and self.samples_per_prompt < 2:
            raise ValueError(
                f"--num-samples should be at least 2 with --judge, but it is {self.num_samples}: one answer "
                "has no other to be compared with."
            )
        if self.samples_per_prompt > 1 and self.temperature == 0:
            raise ValueError(
                "--temperature should be above 0 where several answers are sampled, but it is 0, which gives "
                "the same one each time: raise it."
            )

    @property
    def samples_per_prompt(self) -> int:
        default = 1 if self.judge is None else DEFAULT_NUM_SAMPLES
        return default if self.num_samples is None else self.num_samples

    @property
    def sampling(self) -> Sampling | None:
        """How tokens are drawn; None for greedy answers."""
        if self.temperature == 0:
            return None
        return Sampling(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, seed=self.seed)

    @property
    def answer_length(self) -> int:
        """The most tokens of a sampled answer."""
        if self.max_new_tokens is None:
            return min(self.max_length // 2, MAX_DEFAULT_NEW_TOKENS)
        return self.max_new_tokens

    def find_prompt_length(self, max_positions: int | None = None) -> int:
        """The most tokens of a prompt for a model with a table of so many positions, or without one.

        Raises:
            ValueError: answers leave no room for a prompt in the table.
        """
        room = min(self.max_length, max_positions or self.max_length) - self.answer_length
        if room < 1:
            raise ValueError(
                f"--max-new-tokens should leave room for a prompt in the {max_positions} positions of "
                f"{self.model}, but it is {self.answer_length}: lower it."
            )
        return min(room, self.max_prompt_length or room)
