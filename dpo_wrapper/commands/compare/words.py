"""What the estimates support, in sentences: intervals that overlap are called a tie."""

from collections.abc import Callable, Mapping, Sequence

from dpo_wrapper.commands.compare.intervals import MIN_PROMPTS
from dpo_wrapper.commands.compare.results import MetricResult
from dpo_wrapper.evaluation.statistics.bootstrap import Estimate


def draw_conclusions(results: Sequence[MetricResult], num_seeds: int, num_pairs: int) -> list[str]:
    """The sentences of a page, on each metric and on what was drawn for the intervals."""
    if not results:
        return ["Nothing can be compared, for fewer than two contestants have results."]
    sentences = []
    for one in results:
        sentences.append(describe_order(one.metric.label, one.means, one.metric.format))
        sentences += describe_differences(one)
    seeds = f"{num_seeds} seeds" if num_seeds > 1 else "one seed"
    basis = f"All of this rests on {num_pairs:,} eval pairs and {seeds}"
    if num_seeds == 1:
        basis += ", so that nothing is known of what another seed would change: raise --seeds"
    elif num_seeds < 5:
        basis += ", which say little of how much further seeds would change"
    return [*sentences, f"{basis}."]


def describe_order(
    label: str, estimates: Mapping[str, Estimate], format_value: Callable[[float], str]
) -> str:
    """Who is above whom in a metric, larger values of which need not be better.

    Args:
        label: the metric in words.
        estimates: of each contestant.
        format_value: a value in the metric's unit.
    """
    names = sorted(estimates, key=lambda name: -(estimates[name].value or 0.0))
    shown = {name: f"{name} ({format_value(estimates[name].value or 0.0)})" for name in names}
    below = {
        name: [other for other in names[k + 1 :] if not do_overlap(estimates[name], estimates[other])]
        for k, name in enumerate(names)
    }
    if any(one.bounds is None for one in estimates.values()):
        few = f"for fewer than {MIN_PROMPTS} prompts allow no interval"
        return f"In {label} no order can be told, {few}: {join_words([*shown.values()])}."
    if not any(below.values()):
        return f"In {label} all are a tie, for their intervals overlap: {join_words([*shown.values()])}."
    if all(len(below[name]) == len(names) - 1 - k for k, name in enumerate(names)):
        return f"In {label} the order is {', '.join(shown.values())}: no two intervals overlap."
    first = names[0]
    sentences = [
        f"{shown.pop(name, name)} is above {join_words([shown.pop(other, other) for other in below[name]])}"
        for name in names
        if below[name]
    ]
    text = f"In {label} {'; '.join(sentences)}."
    ties = [shown.get(name, name) for name in names[1:] if name not in below[first]]
    return f"{text} Between {first} and {join_words(ties)} it is a tie." if ties else text


def describe_differences(result: MetricResult) -> list[str]:
    """A sentence on contestants that differ on the same pairs, though their intervals overlap."""
    names = sorted(result.means, key=lambda name: -(result.means[name].value or 0.0))
    first, format_value = names[0], result.metric.format
    shown = []
    for name in names[1:]:
        bounds = result.differences[name].bounds
        if bounds is not None and bounds[1] < 0 and do_overlap(result.means[first], result.means[name]):
            shown.append(f"{name} by {format_value(-bounds[1])} to {format_value(-bounds[0])}")
    if not shown:
        return []
    return [f"On the same pairs and seeds {first} is above {join_words(shown)} all the same."]


def do_overlap(one: Estimate, other: Estimate) -> bool:
    """Whether two intervals have a value in common; where one is not known, they may have."""
    if one.bounds is None or other.bounds is None:
        return True
    return one.bounds[0] <= other.bounds[1] and other.bounds[0] <= one.bounds[1]


def join_words(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
