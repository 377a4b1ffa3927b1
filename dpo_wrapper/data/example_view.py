"""Rows of an `ExampleTable` as the examples that a loss learns from."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_wrapper.data.convert import Choice, choose_completions
from dpo_wrapper.data.errors import ExampleError, OnError, collect_errors
from dpo_wrapper.data.example_table import DATASET_TYPES, ExampleTable
from dpo_wrapper.data.examples import DatasetType, Ranking, TokenizedExample

PREFERENCE, RANKED, UNPAIRED, COMPLETION, DOCUMENT = range(len(DATASET_TYPES))


class ExampleView(Sequence[TokenizedExample]):
    """Some rows of a table, each with all of its completions or with chosen ones, built when asked for.

    Args:
        table: the examples.
        rows: Int[n], the row of each example of the view.
        choices: for each example its completions and its label; by default those of the row.
        is_document: whether an example is its prompt and its best completion as one text without a prompt.
    """

    def __init__(
        self,
        table: ExampleTable,
        rows: NDArray[np.int64],
        choices: Sequence[Choice] | None = None,
        *,
        is_document: bool = False,
    ) -> None:
        self.table, self.rows, self.choices, self.is_document = table, rows, choices, is_document

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            choices = None if self.choices is None else self.choices[index]
            return ExampleView(self.table, self.rows[index], choices, is_document=self.is_document)
        example: TokenizedExample = self.table[int(self.rows[index])]
        if self.choices is not None:
            example = choose(example, *self.choices[index])
        return example.as_document() if self.is_document else example

    def __iter__(self) -> Iterator[TokenizedExample]:
        return (self[index] for index in range(len(self)))


def choose(example: TokenizedExample, indices: Sequence[int], label: bool | None) -> TokenizedExample:
    """The example with some of its completions."""
    scored = None if example.scored is None else tuple(example.scored[k] for k in indices)
    completions = tuple(example.completions[k] for k in indices)
    return replace(example, completions=completions, label=label, scored=scored, ranks=None)


def view_preferences(
    table: ExampleTable,
    rows: NDArray[np.int64],
    dataset_type: DatasetType,
    ranking: Ranking = "all",
    *,
    on_error: OnError = "raise",
) -> tuple[ExampleView, list[ExampleError]]:
    """The preferences among some rows, converted as `convert_examples` does, and errors of those skipped.

    Raises:
        ExampleError: a row has a label or a list where the loss has no use for it, and `on_error` is 'raise'.
    """
    types = table.dataset_types[rows]
    rows = rows[types <= UNPAIRED]
    types = types[types <= UNPAIRED]
    has_margins = table.has_values("margin")
    is_converted = {
        "preference": (types == PREFERENCE).all(),
        "ranked": (types <= RANKED).all() and not table.has_values("ranks") and not has_margins,
        "unpaired_preference": (types == UNPAIRED).all() and not has_margins,
    }
    if is_converted[dataset_type]:
        return ExampleView(table, rows), []
    errors: list[ExampleError] = []
    chosen_rows: list[int] = []
    choices: list[Choice] = []
    for row in rows.tolist():
        example = table[row]
        with collect_errors(errors, on_error, example.source):
            for choice in choose_completions(example, dataset_type, ranking):
                chosen_rows.append(row)
                choices.append(choice)
    return ExampleView(table, np.array(chosen_rows, np.int64), choices), errors


def view_completions(
    table: ExampleTable, rows: NDArray[np.int64], dataset_type: DatasetType, *, is_document: bool
) -> ExampleView:
    """What supervised training learns of some rows: their own completions, or the best ones of preferences.

    If any row is of the dataset type, which is 'prompt_completion' or 'language_modeling', those are taken
    and no others. Otherwise the best completions of all rows that have one are.

    Args:
        is_document: whether the best completions are learned together with their prompts.
    """
    types = table.dataset_types[rows]
    own = rows[types == DATASET_TYPES.index(dataset_type)]
    if len(own):
        return ExampleView(table, own)
    is_undesirable = (types == UNPAIRED) & (table.column("label")[rows] == False)  # noqa: E712  may be None
    kept = rows[~is_undesirable.astype(bool)]
    choices = [((0,), None)] * len(kept)
    return ExampleView(table, kept, choices, is_document=is_document)
