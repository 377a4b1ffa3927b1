"""The data of a run: tables of tokenized examples, of raw files or of prepared data."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpo_wrapper.data.config import DataConfig
from dpo_wrapper.data.convert import read_and_convert
from dpo_wrapper.data.example_table import ExampleTable, TableRow
from dpo_wrapper.data.examples import DatasetType
from dpo_wrapper.data.prepared import PreparedData, as_json_option, format_option, is_prepared
from dpo_wrapper.data.readers import ReadExamples
from dpo_wrapper.data.split import prompt_digest, split_rows
from dpo_wrapper.data.table_digest import digest_table
from dpo_wrapper.data.tokens.encode import tokenize_examples
from dpo_wrapper.data.tokens.tokenizers import Tokenizer
from dpo_wrapper.training.config import TrainConfig, flag
from dpo_wrapper.training.explanations import explain_cuts

Rows = tuple[ExampleTable, NDArray[np.int64]]
"""A table with indices of some of its rows."""


@dataclass(frozen=True)
class RunData:
    """What --data or --eval-data names, before the tokenizer is known.

    Attributes:
        read: the examples of raw files, or None.
        prepared: prepared data, or None.
    """

    read: ReadExamples | None
    prepared: PreparedData | None

    @classmethod
    def open(cls, paths: Sequence[Path], config: TrainConfig) -> "RunData":
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

    def tokenize(self, tokenizer: Tokenizer, config: DataConfig) -> tuple[ExampleTable, list[str]]:
        """The examples as a table, and sentences on what was left out or not used.

        Raises:
            ValueError: the tokenizer refuses a row, or it is not the one that the data was prepared with.
        """
        if self.prepared is not None:
            self.prepared.check_tokenizer(tokenizer)
            table, cuts = self.prepared.examples, self.prepared.manifest["cuts"]
            counts = (cuts.get("shortened_prompts", 0), cuts.get("truncated_completions", 0))
            return table, explain_all_cuts(table, *counts, self.max_length or config.max_length)
        assert self.read is not None
        notes = self.read.notes()
        examples = self.read.examples
        tokenized = tokenize_examples(
            examples, tokenizer, **config.tokenize_options, on_error=config.on_error
        )
        rows = []
        for tokens, origin in zip(tokenized.examples, tokenized.origins, strict=True):
            rows.append(TableRow(tokens, examples[origin].split, prompt_digest(examples[origin])))
        table = ExampleTable.from_rows(rows)
        if tokenized.errors:
            problem = f"{len(tokenized.errors):,} rows could not be tokenized and are left out"
            notes.append(f"{problem}; the first: {tokenized.errors[0]}")
        notes += [tokenized.summary()] if tokenized.summary() else []
        counts = (tokenized.num_shortened_prompts, tokenized.num_truncated_completions)
        notes += explain_all_cuts(table, *counts, config.max_length)
        return table, notes

    def digest(self, table: ExampleTable, *rows: NDArray[np.int64]) -> str:
        """A hash of the examples in `table`, and of the indices of those that are used.

        The examples of prepared data are not read for it: its manifest has a hash of them.
        """
        content = digest_table(table) if self.prepared is None else self.prepared.manifest["fingerprint"]
        digest = hashlib.blake2b(content.encode(), digest_size=16)
        for indices in rows:
            digest.update(np.append(indices, len(indices)).tobytes())
        return digest.hexdigest()


def explain_all_cuts(
    table: ExampleTable, num_prompts: int, num_completions: int, max_length: int
) -> list[str]:
    """Sentences on what is cut, if it is most of the prompts or of the completions."""
    sentences = explain_cuts(num_prompts, len(table), "prompts", max_length)
    total = int(table.num_completions().sum())
    return sentences + explain_cuts(num_completions, total, "completions", max_length)


OTHER_OPTIONS = ("data", "tokenizer", "chat_template", "chat_template_kwargs", "on_bad_row")
"""Options that mean something for prepared data too, or whose tokenizer is compared with that of the data."""


def check_data_options(config: TrainConfig, data: PreparedData) -> None:
    """Raise ValueError for options of reading and cutting that are not those of prepared data."""
    for field in fields(DataConfig):
        value = getattr(config, field.name)
        if field.name in OTHER_OPTIONS or value == field.default:
            continue
        made = data.manifest["options"].get(field.name)
        given = as_json_option(value)
        if given != made:
            was, now = ("not set" if value in (None, []) else format_option(value) for value in (made, given))
            problem = f"{flag(field.name)} should be that of the prepared data, {was}, but it is {now}"
            raise ValueError(f"{problem}: leave it out, or prepare the data again with it.")


def split_table(table: ExampleTable, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """The rows to train and to evaluate on, as `split_examples` chooses them."""
    train, test = split_rows(
        table.column("split").tolist(), table.column("prompt_digest").tolist(), fraction, seed
    )
    return (table, np.array(train, np.int64)), (table, np.array(test, np.int64))


def count_shared_prompts(train: Rows, eval: Rows) -> int:
    """Number of the rows to evaluate on whose prompt is one that is trained on."""
    digests = [table.column("prompt_digest")[rows] for table, rows in (train, eval)]
    return int(np.isin(digests[1], digests[0]).sum())
