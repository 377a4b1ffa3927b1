"""The types that data passes through: an example as text, and an example as token ids."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dpo_wrapper.data.errors import ExampleError, describe_value
from dpo_wrapper.data.rows.dialogues import Completion
from dpo_wrapper.data.rows.messages import Turns

DatasetType = Literal["preference", "ranked", "unpaired_preference", "prompt_completion", "language_modeling"]
"""How sequences meet in a loss: pairs, ranked lists, completions with a label, completions to imitate, and
documents (TRL's words)."""

DATASET_TYPES: tuple[DatasetType, ...] = get_args(DatasetType)

PREFERENCE_TYPES: tuple[DatasetType, ...] = ("preference", "ranked", "unpaired_preference")
"""The dataset types that preference training learns from."""

Kind = DatasetType | Literal["auto"]
"""What the rows of a file should be read as; 'auto' finds it out. The three types of preferences are read
alike, and `convert_examples` makes one of the others."""

Ranking = Literal["all", "best"]
"""Which pairs a ranked list becomes: all, or the best completion with each of the others."""

TokenIds = tuple[int, ...]


@dataclass(frozen=True)
class Fields:
    """The names of a data set's columns.

    Without a name for the prompt, it is looked for in the usual columns, and otherwise taken from the
    dialogues. A column that is named has to exist. A name with dots reaches into nested objects. An empty
    name ignores a column; that of the prompt says that texts have none.

    Raises:
        ValueError: a name is empty, no string, or given twice.
    """

    prompt: str | None = None
    chosen: str = "chosen"
    rejected: str = "rejected"
    completions: str = "completions"
    completion: str = "completion"
    label: str = "label"
    split: str = "split"
    weight: str = "weight"
    margin: str = "margin"
    system: str = "system"
    tools: str = "tools"
    text: str = "text"
    loss_masking_spans: str = "loss_masking_spans"
    subset: str = "subset"

    def __post_init__(self) -> None:
        given = {key: name for key, name in vars(self).items() if name is not None and name != ""}
        if given.get("prompt") == given.get("text"):
            given.pop("text", None)  # a text is the prompt where a completion stands beside it
        names = [*given.values()]
        required = [self.chosen, self.rejected]
        if (
            not all(isinstance(name, str) for name in names)
            or not all(required)
            or len(set(names)) < len(names)
        ):
            problem = "field names should be different and those of the texts not empty, but they are "
            raise ValueError(problem + ", ".join(map(describe_value, names)) + ": name each column once.")

    @property
    def renamed(self) -> dict[str, str]:
        """The usual names of columns that have another name here."""
        return {name: given for name, given in vars(self).items() if given is not None and given != name}


DEFAULT_FIELDS = Fields()


def find_family(kind: DatasetType) -> DatasetType:
    """The type whose rows a file may mix with those of this one: all preferences are of one family."""
    return "preference" if kind in PREFERENCE_TYPES else kind


def find_dataset_type(num_completions: int, label: bool | None, is_document: bool) -> DatasetType:
    """The dataset type of an example with these completions."""
    if label is not None:
        return "unpaired_preference"
    if num_completions > 1:
        return "preference" if num_completions == 2 else "ranked"
    return "language_modeling" if is_document else "prompt_completion"


@dataclass(frozen=True)
class Example:
    """A prompt with its completions, as text.

    Attributes:
        prompt: plain text, or the messages of a dialogue. If the last is the assistant's, completions go on
            from it.
        completions: the best first; a pair is a list of two. In a dialogue a completion is the answer to the
            last message, or turns from one answer to another. A completion may be empty.
        label: whether the only completion is desirable; None for pairs and ranked lists.
        weight: factor of the example's loss.
        margin: nats by which chosen should win over rejected.
        split: 'train', 'test', or None if the data does not say.
        source: the place in the file, such as 'prefs.jsonl, line 12'.
        tools: that a dialogue may call, as JSON schemas.
        ranks: a number for each completion, equal for ties; None where the order is the rank.
        loss_masking_spans: ranges [start, end) of the completion's characters that are not scored.
        is_document: whether the only completion is a text to continue from its beginning, without a prompt.
        form: the name of the form that the row had.
        subset: the part of a benchmark that the row belongs to; None if the data does not say.
    """

    prompt: str | Turns
    completions: tuple[Completion, ...]
    label: bool | None = None
    weight: float | None = None
    margin: float | None = None
    split: str | None = None
    source: str = ""
    tools: tuple[Any, ...] = ()
    ranks: tuple[float, ...] | None = None
    loss_masking_spans: tuple[tuple[int, int], ...] = ()
    is_document: bool = False
    form: str = field(default="", compare=False)
    subset: str | None = field(default=None, compare=False)

    @property
    def dataset_type(self) -> DatasetType:
        return find_dataset_type(len(self.completions), self.label, self.is_document)


@dataclass(frozen=True)
class TokenizedExample:
    """An example as token ids. Every completion continues the same prompt, and its tokens are scored.

    Attributes:
        prompt: Int[k].
        completions: one Int[n] each, in the example's order.
        label, weight, margin, source: as in `Example`.
        kl_completion: a completion of another prompt, by which `KTO` estimates its KL; empty for none.
        scored: for each completion whether a token of prompt and completion together is scored, Bool[k + n];
            None if these are all tokens of the completions.
        ranks, is_document: as in `Example`; a document that is too long is several examples.
        is_cut: whether prompt or completions lost tokens, or the example is a part of a document.
    """

    prompt: TokenIds
    completions: tuple[TokenIds, ...]
    label: bool | None = None
    weight: float | None = None
    margin: float | None = None
    source: str = ""
    kl_completion: TokenIds = ()
    scored: tuple[tuple[bool, ...], ...] | None = None
    ranks: tuple[float, ...] | None = None
    is_document: bool = False
    is_cut: bool = field(default=False, compare=False)

    @property
    def dataset_type(self) -> DatasetType:
        return find_dataset_type(len(self.completions), self.label, self.is_document)

    @property
    def chosen(self) -> TokenIds:
        return self.completions[0]

    @property
    def rejected(self) -> TokenIds:
        return self.completions[1]

    @property
    def scored_or_none(self) -> list[tuple[bool, ...] | None]:
        """`scored` of each completion, as batches take it."""
        return list(self.scored or [None] * len(self.completions))

    def scored_masks(self) -> list[list[bool]]:
        """For each completion, which tokens of prompt and completion are scored; the first token never is."""
        spans = [(len(self.prompt), len(completion)) for completion in self.completions]
        masks = self.scored or [(False,) * start + (True,) * count for start, count in spans]
        return [[False, *mask[1:]] for mask in masks]

    @property
    def sft_completion(self) -> TokenIds | None:
        """The completion that supervised training learns, the best one; None if it is undesirable."""
        return None if self.label is False else self.completions[0]

    def as_document(self) -> "TokenizedExample":
        """Prompt and best completion as one document, all of whose tokens are scored."""
        ids = self.prompt + self.completions[0]
        return TokenizedExample(
            (), (ids,), weight=self.weight, source=self.source, is_document=True, is_cut=self.is_cut
        )

    @property
    def sequences(self) -> list[tuple[TokenIds, TokenIds, tuple[bool, ...] | None]]:
        """The prompt with each completion, and with the KL completion if there is one, and their `scored`."""
        extra = [(self.kl_completion, None)] if self.kl_completion else []
        completions = [*zip(self.completions, self.scored_or_none, strict=True), *extra]
        return [(self.prompt, completion, scored) for completion, scored in completions]


@dataclass(frozen=True)
class TokenizedExamples:
    """Tokenized examples, and counts of what was left out or shortened.

    Attributes:
        num_identical: examples left out because all completions are the same tokens.
        num_identical_cut: examples left out because all completions are the same tokens once they are cut.
        num_unscored: examples left out because a completion has no scored token; a list needs two that have.
        num_dropped: examples left out because they are longer than the maximum.
        num_split: texts that are longer than the maximum and became several examples.
        origins: index of the `Example` that each of `examples` was made of.
        errors: of the examples that were skipped.
        num_continued: examples in which a token of the whole text would span the border, so that completions
            were tokenized as what follows the prompt's own ids.
        num_cut: examples whose prompt ends before what the chat template writes at inference to open an
            answer.
        num_as_chat: examples whose plain prompt became the user's turn of a dialogue.
        num_template_text: examples whose plain prompt had been written by a chat template already.
    """

    examples: list[TokenizedExample]
    num_identical: int = 0
    num_unscored: int = 0
    num_shortened_prompts: int = 0
    num_truncated_completions: int = 0
    errors: list[ExampleError] = field(default_factory=list)
    num_continued: int = 0
    num_cut: int = 0
    num_as_chat: int = 0
    num_template_text: int = 0
    num_dropped: int = 0
    num_split: int = 0
    num_identical_cut: int = 0
    origins: list[int] = field(default_factory=list, compare=False)

    def summary(self, *, says_cuts: bool = True) -> str:
        """One sentence on what was left out or shortened; empty if nothing was."""
        left_out = [
            (len(self.errors), "with an error"),
            (self.num_identical, "with the same tokens in every completion"),
            (self.num_identical_cut, "that differ only behind the maximum length, which should be larger"),
            (self.num_unscored, "with nothing to score"),
            (self.num_dropped, "longer than the maximum"),
        ]
        prompts, completions = self.num_shortened_prompts, self.num_truncated_completions
        shortened = [(prompts, "prompt", "(earliest text)"), (completions, "completion", "(end)")]
        total = len(self.examples) + sum(n for n, _ in left_out)
        reasons = ", ".join(f"{n:,} {reason}" for n, reason in left_out if n)
        cuts = ", ".join(f"{n:,} {noun}{'s' * (n > 1)} {end}" for n, noun, end in shortened if n)
        clauses = [f"left out of {total:,} example{'s' * (total != 1)}: {reasons}"] if reasons else []
        clauses += [f"cut to the maximum length: {cuts}"] if cuts and says_cuts else []
        kinds = [
            (self.num_continued, "in {} a token would span the border, so completions were tokenized apart"),
            (self.num_cut, "in {} the chat template writes less before an answer than to open one"),
            (self.num_as_chat, "in {} the chat template makes a plain prompt the user's turn"),
            (self.num_template_text, "in {} a plain prompt has been written by a chat template already"),
            (self.num_split, "{} became several, for the text is longer than the maximum"),
        ]
        clauses += [sentence.format(f"{n:,} example{'s' * (n != 1)}") for n, sentence in kinds if n]
        text = "; ".join(clauses)
        return f"{text[0].upper()}{text[1:]}." if text else ""
