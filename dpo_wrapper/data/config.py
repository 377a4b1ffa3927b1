"""Settings of how data is read and tokenized, which the commands share."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpo_wrapper.data.errors import OnError
from dpo_wrapper.data.examples import DATASET_TYPES, DatasetType, Fields
from dpo_wrapper.data.tokens.encoded import Score
from dpo_wrapper.data.tokens.options import OnLong, TokenizeOptions


def flag(field_name: str) -> str:
    """The command line's flag for an option."""
    return f"--{field_name.replace('_', '-')}"


CHOICES: dict[str, tuple[str | None, ...]] = {
    "kind": (None, *DATASET_TYPES),
    "on_bad_row": ("error", "skip"),
    "as_chat": ("auto", "always", "never"),
}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What data to read, and how.

    Raises:
        ValueError: a setting that cannot be.
    """

    data: tuple[Path, ...]
    """Files (.jsonl, .ndjson, .json, .csv, .tsv, also packed; .parquet, .arrow), folders of files, patterns,
    folders that `datasets` has saved, or names of data sets on the hub. A row of preferences holds a pair, a
    ranked list of completions or, for KTO, one completion with a label."""
    columns: tuple[str, ...] = ()
    """Names of columns that differ from the usual ones, like prompt=question chosen=best. Names with dots
    reach into nested objects. Known: prompt, chosen, rejected, completions, completion, label, split, weight,
    margin, system, tools, text, loss_masking_spans, subset. An empty name, as in margin=, ignores the column;
    prompt= says that texts have no prompt."""
    split: str | None = None
    """The split to read of data sets that have several; by default all. Splits called test, val or the like
    are evaluated on."""
    kind: DatasetType | None = None
    """What the rows are, and are made into where they are preferences. By default it is found out from each
    file: preferences, prompt_completion (a prompt with one completion, a dialogue, or a text with
    loss_masking_spans) or language_modeling (a text)."""
    score: Score | None = None
    """The turns of a dialogue that are scored: the answer to the prompt (last), or every turn of the
    assistant (assistant). By default last for preferences, and assistant otherwise."""
    as_chat: Literal["auto", "always", "never"] = "auto"
    """Whether a plain-text prompt is the user's turn of a dialogue. auto: where the tokenizer has a chat
    template, unless the prompt has been written by one already."""
    chat_template: Path | None = None
    """File with a chat template to use instead of the tokenizer's own."""
    chat_template_kwargs: str | None = None
    """What the chat template is called with besides the messages, as JSON: '{"enable_thinking": false}'."""
    allow_empty: bool = False
    """Learn from completions without text as well, of which the end is all there is. By default such a row is
    a bad row."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What happens to a row that cannot be read. error: stop at the first; skip: leave such rows out and
    print their number."""
    tokenizer: str | None = None
    """bytes, or a Hugging Face tokenizer by folder or name. By default the model's own; a new model uses
    bytes."""
    max_length: int = 512
    """Maximum sequence length in tokens."""
    max_prompt_length: int | None = None
    """Maximum length of a prompt in tokens: dialogues lose their earliest turns, other text its front."""
    on_long: OnLong = "cut"
    """What happens to a sequence that is longer than --max-length. cut: it loses the earliest turns or the
    front of the prompt first, then the end of the completion, and a text without a prompt becomes several;
    drop: it is left out; error: stop at the first."""

    def __post_init__(self) -> None:
        if isinstance(self.data, (str, Path)):
            object.__setattr__(self, "data", (Path(self.data),))
        if not self.data:
            problem = "--data should name at least one file, but it names none"
            raise ValueError(f"{problem}: write --data FILE, behind arguments that have no name.")
        self.fields  # noqa: B018  raises for columns that cannot be
        self.tokenizer_options(None)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                known = ", ".join(str(choice) for choice in choices if choice is not None)
                problem = f"{flag(name)} should be one of {known}, but it is {value!r}"
                raise ValueError(f"{problem}: choose one of them.")
        try:
            TokenizeOptions(**self.tokenize_options)
        except ValueError as error:
            name, _, rest = str(error).partition(" ")
            raise ValueError(f"{flag(name)} {rest}") from error

    @property
    def fields(self) -> Fields:
        """The names of the columns."""
        names: dict[str, str] = {}
        for item in self.columns:
            name, equals, column = item.partition("=")
            if not equals or name not in Fields.__dataclass_fields__ or name in names:
                known = ", ".join(Fields.__dataclass_fields__)
                problem = (
                    f"--columns should hold pairs like prompt=question, each name once, but it holds '{item}'"
                )
                raise ValueError(f"{problem}: the names are {known}.")
            names[name] = column
        return Fields(**names)

    def tokenizer_options(self, today: Any) -> dict[str, Any]:
        """Options of `load_tokenizer`; `today` is the date for templates that print one."""
        template = None
        if self.chat_template is not None:
            try:
                template = self.chat_template.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                problem = f"--chat-template should be a file with a template, but '{self.chat_template}'"
                raise ValueError(f"{problem} cannot be read ({error}): check the path.") from error
        arguments = None
        if self.chat_template_kwargs is not None:
            try:
                arguments = json.loads(self.chat_template_kwargs)
            except ValueError:
                arguments = None
            if not isinstance(arguments, dict):
                problem = (
                    f"--chat-template-kwargs should be a JSON object, but it is {self.chat_template_kwargs!r}"
                )
                raise ValueError(f"{problem}: write it like '{{\"enable_thinking\": false}}'.")
        return {"chat_template": template, "template_arguments": arguments, "today": today}

    @property
    def on_error(self) -> OnError:
        return "skip" if self.on_bad_row == "skip" else "raise"

    @property
    def tokenize_options(self) -> dict[str, Any]:
        """The arguments of `TokenizeOptions`."""
        return {
            "max_length": self.max_length,
            "max_prompt_length": self.max_prompt_length,
            "on_long": self.on_long,
            "score": self.score,
            "as_chat": self.as_chat_option,
            "allow_empty": self.allow_empty,
        }

    @property
    def as_chat_option(self) -> bool | None:
        """`as_chat` as `tokenize_examples` takes it."""
        return {"auto": None, "always": True, "never": False}[self.as_chat]
