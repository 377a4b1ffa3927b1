"""The data of a run: tables of tokenized examples, split into those to train and to evaluate on."""

import numpy as np
from numpy.typing import NDArray

from dpo_wrapper.data.example_table import ExampleTable
from dpo_wrapper.data.input_data import TokenizedData
from dpo_wrapper.data.split import split_rows
from dpo_wrapper.data.trained_prompts import PromptDigests
from dpo_wrapper.training.explanations import explain_cuts

Rows = tuple[ExampleTable, NDArray[np.int64]]
"""A table with indices of some of its rows."""


def explain_all_cuts(data: TokenizedData, max_length: int) -> list[str]:
    """Sentences on what is cut, if it is most of the prompts or of the completions."""
    sentences = explain_cuts(data.num_shortened_prompts, len(data.table), "prompts", max_length)
    total = int(data.table.num_completions().sum())
    return sentences + explain_cuts(data.num_truncated_completions, total, "completions", max_length)


def split_table(table: ExampleTable, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """The rows to train and to evaluate on, as `split_examples` chooses them."""
    train, test = split_rows(
        table.column("split").tolist(), table.column("prompt_digest").tolist(), fraction, seed
    )
    return (table, np.array(train, np.int64)), (table, np.array(test, np.int64))


def count_trained_prompts(trained_prompts: PromptDigests, eval: Rows) -> int:
    """Number of the rows to evaluate on whose prompt is one that is trained on."""
    table, rows = eval
    return int(np.isin(table.column("prompt_digest")[rows], trained_prompts).sum())
