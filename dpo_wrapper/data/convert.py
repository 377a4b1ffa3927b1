"""Examples -> examples of the type that a loss learns from."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from dpo_wrapper.data.config import DataConfig
from dpo_wrapper.data.errors import ExampleError, OnError, check_on_error, collect_errors
from dpo_wrapper.data.examples import (
    PREFERENCE_TYPES,
    DatasetType,
    Example,
    Ranking,
    TokenizedExample,
)
from dpo_wrapper.data.readers import ReadExamples, read_examples


def convert_examples(
    examples: Iterable[Example],
    dataset_type: DatasetType,
    ranking: Ranking = "all",
    *,
    on_error: OnError = "raise",
) -> tuple[list[Example], list[ExampleError]]:
    """Convert examples to what a loss needs, and return the errors of those that were skipped.

    'preference': a ranked list becomes pairs, in the order (0, 1), (0, 2), ..., (1, 2), ...;
    completions with equal ranks make none.
    'ranked': a pair is a list of two; of completions with equal ranks the first is kept.
    'unpaired_preference': a pair becomes one desirable and one undesirable completion.

    Args:
        examples: pairs, ranked lists and completions with a label.
        dataset_type: what the loss learns from.
        ranking: which pairs a ranked list becomes: 'all', or the 'best' completion with each of the others.
        on_error: 'raise' stops at the first example that cannot be converted; 'skip' leaves such ones out.

    Raises:
        ExampleError: an example has a label or a list where the loss has no use for it, or a margin although
            it is no pair.
    """
    check_on_error(on_error)
    converted: list[Example] = []
    errors: list[ExampleError] = []
    for example in examples:
        with collect_errors(errors, on_error, example.source):
            converted += _convert(example, dataset_type, ranking)
    return converted, errors


def read_and_convert(paths: Sequence[Path], config: DataConfig) -> ReadExamples:
    """The examples of files, read as a configuration says; preferences are converted if it names a type."""
    kind, on_error = config.kind, config.on_error
    read = read_examples(paths, config.fields, split=config.split, on_error=on_error, kind=kind or "auto")
    if kind is None or kind not in PREFERENCE_TYPES:
        return read
    examples, errors = convert_examples(read.examples, kind, on_error=on_error)
    return replace(read, examples=examples, errors=[*read.errors, *errors])


def check_ranking(ranking: Ranking | None, dataset_type: DatasetType, has_lists: bool) -> None:
    """Refuse a ranking that has no effect; `has_lists` is whether a row has more than two completions."""
    if ranking is not None and not (dataset_type == "preference" and has_lists):
        reason = "no row has more than two completions"
        if dataset_type != "preference":
            reason = f"the loss takes {dataset_type} data"
        problem = f"ranking should be given only where lists become pairs, but it is '{ranking}' and {reason}"
        raise ValueError(f"{problem}: leave the ranking out.")


SKIP = ", or leave such rows out (--on-bad-row skip)"
"""What can be done with rows that a loss has no use for."""

Choice = tuple[tuple[int, ...], bool | None]
"""Indices of completions, and a label if there is but one."""


def choose_completions(
    example: Example | TokenizedExample, dataset_type: DatasetType, ranking: Ranking = "all"
) -> list[Choice]:
    """The completions of each example that an example becomes for a loss; ExampleError if it becomes none."""
    count = len(example.completions)
    if example.margin is not None and (dataset_type != "preference" or count != 2):
        problem = f"the margin should be that of a pair, but it is {example.margin} for other data"
        raise ExampleError(f"{problem}: leave it out, or write pairs and take a loss of pairs.")
    if dataset_type == "unpaired_preference":
        if example.label is not None:
            return [((0,), example.label)]
        if count != 2:
            problem = f"a row should have one completion with a label, but it has a ranked list of {count}"
            raise ExampleError(f"{problem}: give each a label, or take a loss of lists or pairs{SKIP}.")
        return [((0,), True), ((1,), False)]
    if example.label is not None:
        problem = "a row should have two completions or more, but it has one with a label"
        raise ExampleError(f"{problem}: write pairs or ranked lists, or take a loss such as KTO{SKIP}.")
    ranks = example.ranks or tuple(range(count))
    if dataset_type == "ranked":
        return [(tuple(k for k in range(count) if ranks[k] not in ranks[:k]), None)]
    pairs = list(combinations(range(count), 2))[: None if ranking == "all" else count - 1]
    return [(pair, None) for pair in pairs if ranks[pair[0]] != ranks[pair[1]]]


def _convert(example: Example, dataset_type: DatasetType, ranking: Ranking) -> list[Example]:
    return [
        replace(example, completions=tuple(example.completions[k] for k in chosen), label=label, ranks=None)
        for chosen, label in choose_completions(example, dataset_type, ranking)
    ]
