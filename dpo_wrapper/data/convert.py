"""Examples -> examples of the type that a loss learns from."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations

from dpo_wrapper.data.errors import ExampleError, OnError, check_on_error, collect_errors
from dpo_wrapper.data.examples import DatasetType, Example, Ranking


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


def check_ranking(ranking: Ranking | None, dataset_type: DatasetType, examples: Iterable[Example]) -> None:
    """Refuse a ranking that has no effect."""
    is_used = dataset_type == "preference" and any(len(example.completions) > 2 for example in examples)
    if ranking is not None and not is_used:
        reason = "no row has more than two completions"
        if dataset_type != "preference":
            reason = f"the loss takes {dataset_type} data"
        problem = f"ranking should be given only where lists become pairs, but it is '{ranking}' and {reason}"
        raise ValueError(f"{problem}: leave the ranking out.")


def _convert(example: Example, dataset_type: DatasetType, ranking: Ranking) -> list[Example]:
    count = len(example.completions)
    if example.margin is not None and (dataset_type != "preference" or count != 2):
        problem = f"the margin should be that of a pair, but it is {example.margin} for other data"
        raise ExampleError(f"{problem}: leave it out, or write pairs and take a loss of pairs.")
    if dataset_type == "unpaired_preference":
        if example.label is not None:
            return [example]
        if count != 2:
            problem = f"a row should have one completion with a label, but it has a ranked list of {count}"
            raise ExampleError(f"{problem}: give each a label, or take a loss of lists or pairs.")
        sides = zip(example.completions, (True, False), strict=True)
        return [replace(example, completions=(text,), label=label) for text, label in sides]
    if example.label is not None:
        problem = "a row should have two completions or more, but it has one with a label"
        raise ExampleError(f"{problem}: write pairs or ranked lists, or take a loss such as KTO.")
    ranks = example.ranks or tuple(range(count))
    if dataset_type == "ranked":
        first = [k for k in range(count) if ranks[k] not in ranks[:k]]
        return [replace(example, completions=tuple(example.completions[k] for k in first), ranks=None)]
    pairs = list(combinations(range(count), 2))[: None if ranking == "all" else count - 1]
    return [
        replace(example, completions=(example.completions[one], example.completions[other]), ranks=None)
        for one, other in pairs
        if ranks[one] != ranks[other]
    ]
