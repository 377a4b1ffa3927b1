"""What a command's options name as data, raw files or prepared data, as a table of tokenized examples."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpo_wrapper.data.config import DataConfig, flag
from dpo_wrapper.data.convert import read_and_convert
from dpo_wrapper.data.example_table import ExampleTable, TableRow
from dpo_wrapper.data.examples import DatasetType, Example
from dpo_wrapper.data.prepared import PreparedData, as_json_option, format_option, is_prepared
from dpo_wrapper.data.readers import ReadExamples
from dpo_wrapper.data.split import prompt_digest
from dpo_wrapper.data.table_digest import digest_table
from dpo_wrapper.data.tokens.encode import tokenize_examples
from dpo_wrapper.data.tokens.tokenizers import Tokenizer


@dataclass(frozen=True)
class TokenizedData:
    """A table of examples, and what was seen on the way.

    Attributes:
        table: of all tokenized examples.
        notes: sentences on what was left out or not used.
        num_shortened_prompts, num_truncated_completions: as in `TokenizedExamples`.
        originals: of raw files the examples as text.
        origins: index into `originals` of each row of the table.
    """

    table: ExampleTable
    notes: list[str]
    num_shortened_prompts: int
    num_truncated_completions: int
    originals: Sequence[Example] = ()
    origins: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class InputData:
    """What --data or --eval-data names, before the tokenizer is known.

    Attributes:
        read: the examples of raw files, or None.
        prepared: prepared data, or None.
    """

    read: ReadExamples | None
    prepared: PreparedData | None

    @classmethod
    def open(cls, paths: Sequence[Path], config: DataConfig) -> "InputData":
        """Read raw files, or open prepared data.

        Raises:
            ValueError: the data cannot be used, or prepared data is given with other data or with other
                options than it was prepared with.
        """
        prepared = [path for path in paths if is_prepared(path)]
        if not prepared:
            return cls(read_and_convert(paths, config), None)
        if len(paths) > 1:
            problem = f"prepared data should be the only --data, but {prepared[0]} is one of {len(paths)}"
            raise ValueError(f"{problem}: prepare all files into one folder.")
        data = PreparedData.open(prepared[0])
        check_data_options(config, data)
        return cls(None, data)

    @property
    def dataset_types(self) -> set[DatasetType]:
        if self.prepared is not None:
            return set(self.prepared.manifest["dataset_types"])
        assert self.read is not None
        return {example.dataset_type for example in self.read.examples}

    @property
    def today(self) -> date | None:
        """The date that a template printed into prepared data."""
        return None if self.prepared is None else self.prepared.template_date

    @property
    def max_length(self) -> int | None:
        """The length that prepared data was cut to."""
        return None if self.prepared is None else self.prepared.manifest["options"]["max_length"]

    def tokenize(self, tokenizer: Tokenizer, config: DataConfig, *, says_cuts: bool = True) -> TokenizedData:
        """The examples as tokens.

        Args:
            says_cuts: whether the notes say how many of all rows are cut.

        Raises:
            ValueError: the tokenizer refuses a row, or it is not the one that the data was prepared with.
        """
        if self.prepared is not None:
            self.prepared.check_tokenizer(tokenizer)
            cuts = self.prepared.manifest["cuts"]
            counts = (cuts.get("shortened_prompts", 0), cuts.get("truncated_completions", 0))
            return TokenizedData(self.prepared.examples, [], *counts)
        assert self.read is not None
        notes = self.read.notes()
        examples = self.read.examples
        tokenized = tokenize_examples(
            examples, tokenizer, **config.tokenize_options, on_error=config.on_error
        )
        rows = []
        for tokens, origin in zip(tokenized.examples, tokenized.origins, strict=True):
            rows.append(TableRow(tokens, examples[origin].split, prompt_digest(examples[origin])))
        if tokenized.errors:
            problem = f"{len(tokenized.errors):,} rows could not be tokenized and are left out"
            notes.append(f"{problem}; the first: {tokenized.errors[0]}")
        summary = tokenized.summary(says_cuts=says_cuts)
        notes += [summary] if summary else []
        counts = (tokenized.num_shortened_prompts, tokenized.num_truncated_completions)
        table = ExampleTable.from_rows(rows)
        return TokenizedData(table, notes, *counts, examples, tokenized.origins)

    def digest(self, table: ExampleTable, *rows: NDArray[np.int64]) -> str:
        """A hash of the examples in `table`, and of the indices of those that are used.

        The examples of prepared data are not read for it: its manifest has a hash of them.
        """
        content = digest_table(table) if self.prepared is None else self.prepared.manifest["fingerprint"]
        digest = hashlib.blake2b(content.encode(), digest_size=16)
        for indices in rows:
            digest.update(np.append(indices, len(indices)).tobytes())
        return digest.hexdigest()


OTHER_OPTIONS = ("data", "tokenizer", "chat_template", "chat_template_kwargs", "on_bad_row")
"""Options that mean something for prepared data too, or whose tokenizer is compared with that of the data."""


def check_data_options(config: DataConfig, data: PreparedData) -> None:
    """Raise ValueError for options of reading and cutting that are not those of prepared data."""
    for option in fields(DataConfig):
        value = getattr(config, option.name)
        if option.name in OTHER_OPTIONS or value == option.default:
            continue
        made = data.manifest["options"].get(option.name)
        given = as_json_option(value)
        if given != made:
            was, now = ("not set" if value in (None, []) else format_option(value) for value in (made, given))
            problem = f"{flag(option.name)} should be that of the prepared data, {was}, but it is {now}"
            raise ValueError(f"{problem}: leave it out, or prepare the data again with it.")
