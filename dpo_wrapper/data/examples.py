"""The types that data passes through: an example as text, and an example as token ids."""

from dataclasses import dataclass, field
from typing import Literal

from dpo_wrapper.data.chat import Message
from dpo_wrapper.data.errors import ExampleError, describe_value

DatasetType = Literal["preference", "ranked", "unpaired_preference"]
"""What a loss learns from: pairs, ranked lists, or completions with a label (TRL's words)."""

Ranking = Literal["all", "best"]
"""Which pairs a ranked list becomes: all, or the best completion with each of the others."""

TokenIds = tuple[int, ...]


@dataclass(frozen=True)
class Fields:
    """The names of a data set's columns.

    Without a name for the prompt, it is looked for in 'prompt', 'text', 'conversations' and 'messages', and
    otherwise taken from the dialogues. A column that is named has to exist.

    Raises:
        ValueError: a name is empty, no string, or given twice.
    """

    prompt: str | None = None
    chosen: str = "chosen"
    rejected: str = "rejected"
    split: str = "split"
    weight: str = "weight"
    margin: str = "margin"

    def __post_init__(self) -> None:
        names = [name for name in vars(self).values() if name is not None]
        if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
            problem = "field names should be different and not empty, but they are "
            raise ValueError(problem + ", ".join(map(describe_value, names)) + ": name each column once.")


DEFAULT_FIELDS = Fields()


@dataclass(frozen=True)
class Example:
    """A prompt with its completions, as text.

    Attributes:
        prompt: plain text, or the messages of a dialogue, of which the last is not the assistant's.
        completions: the best first; a pair is a list of two. In a dialogue a completion is the answer to the
            last message. A completion may be empty.
        label: whether the only completion is desirable; None for pairs and ranked lists.
        weight: factor of the example's loss.
        margin: nats by which chosen should win over rejected.
        split: 'train', 'test', or None if the data does not say.
        source: the place in the file, such as 'prefs.jsonl, line 12'.
    """

    prompt: str | tuple[Message, ...]
    completions: tuple[str, ...]
    label: bool | None = None
    weight: float | None = None
    margin: float | None = None
    split: str | None = None
    source: str = ""


@dataclass(frozen=True)
class TokenizedExample:
    """An example as token ids. Every completion continues the same prompt, and its tokens are scored.

    Attributes:
        prompt: Int[k].
        completions: one Int[n] each, in the example's order.
        label, weight, margin, source: as in `Example`.
        kl_completion: a completion of another prompt, by which `KTO` estimates its KL; empty for none.
    """

    prompt: TokenIds
    completions: tuple[TokenIds, ...]
    label: bool | None = None
    weight: float | None = None
    margin: float | None = None
    source: str = ""
    kl_completion: TokenIds = ()

    @property
    def chosen(self) -> TokenIds:
        return self.completions[0]

    @property
    def rejected(self) -> TokenIds:
        return self.completions[1]

    @property
    def sft_completion(self) -> TokenIds | None:
        """The completion that supervised training learns, the best one; None if it is undesirable."""
        return None if self.label is False else self.completions[0]

    @property
    def sequences(self) -> list[tuple[TokenIds, TokenIds]]:
        """The prompt with each completion, and with the KL completion if there is one."""
        completions = (*self.completions, *([self.kl_completion] if self.kl_completion else []))
        return [(self.prompt, completion) for completion in completions]


@dataclass(frozen=True)
class TokenizedExamples:
    """Tokenized examples, and counts of what was left out or shortened.

    Attributes:
        num_identical: examples left out because all completions are the same tokens.
        num_unscored: examples left out because a completion has no scored token; a list needs two that have.
        errors: of the examples that were skipped.
    """

    examples: list[TokenizedExample]
    num_identical: int = 0
    num_unscored: int = 0
    num_shortened_prompts: int = 0
    num_truncated_completions: int = 0
    errors: list[ExampleError] = field(default_factory=list)

    def summary(self) -> str:
        """One sentence on what was left out or shortened; empty if nothing was."""
        left_out = [
            (len(self.errors), "with an error"),
            (self.num_identical, "with the same tokens in every completion"),
            (self.num_unscored, "with nothing to score"),
        ]
        prompts, completions = self.num_shortened_prompts, self.num_truncated_completions
        shortened = [(prompts, "prompt", "at the front"), (completions, "completion", "at the end")]
        total = len(self.examples) + sum(n for n, _ in left_out)
        reasons = ", ".join(f"{n:,} {reason}" for n, reason in left_out if n)
        cuts = ", ".join(f"{n:,} {noun}{'s' * (n > 1)} {end}" for n, noun, end in shortened if n)
        clauses = [f"left out of {total:,} examples: {reasons}"] if reasons else []
        clauses += [f"cut to fit: {cuts}"] if cuts else []
        text = "; ".join(clauses)
        return f"{text[0].upper()}{text[1:]}." if text else ""
