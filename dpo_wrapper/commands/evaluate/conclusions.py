"""What the figures of an evaluation support, in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_wrapper.evaluation.statistics.figures import ACCURACY

Interval = Mapping[str, float | None]

MIN_SIDE_PAIRS = 10
"""Pairs whose chosen answer is the longer one, or the shorter one, below which lengths cannot be balanced."""


def draw_conclusions(content: Mapping[str, Any], has_reference: bool) -> list[str]:
    """Sentences on accuracy, on length, and on the answers if they were judged.

    Args:
        content: what evaluation.json holds.
        has_reference: whether rewards are relative to a reference.
    """
    figures = content["figures"]
    sentences = [conclude_accuracy(figures[ACCURACY], content["pairs"], has_reference)]
    sentences += conclude_length(figures, content["length_bins"])
    if (answers := content.get("answers")) is not None and "win_rate" in answers:
        sentences.append(conclude_win_rate(answers))
    return sentences


def conclude_accuracy(accuracy: Interval, num_pairs: int, has_reference: bool) -> str:
    low, high, span = accuracy["low"], accuracy["high"], format_interval(accuracy)
    than = " more than the reference does" if has_reference else ""
    if low is None or high is None:
        return (
            "All pairs are of one prompt, so that nothing can be said about others: evaluate on more prompts."
        )
    if low == high == 0.5:
        return "Every pair is a tie within rounding: nothing tells the model from a coin."
    if low <= 0.5 <= high:
        return (
            f"The accuracy, {span}, may be that of a coin: these {num_pairs:,} pairs do not show that the "
            f"model prefers chosen answers{than}."
        )
    if high < 0.5:
        return f"The accuracy, {span}, is below that of a coin: the model prefers the rejected answers{than}."
    return f"The accuracy, {span}, is above that of a coin: the model prefers the chosen answers{than}."


def conclude_length(figures: Mapping[str, Interval], bins: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence on what length alone explains; none where nothing can be said of it.

    `bins` are those of pairs by the difference of their lengths.
    """
    balanced, longer = figures["accuracy/lengths_balanced"], figures["length/longer_wins"]
    accuracy = figures[ACCURACY]
    if balanced["low"] is None or balanced["high"] is None or accuracy["low"] is None:
        return []
    rule = "the longer answer" if (longer["value"] or 0) >= 0.5 else "the shorter answer"
    share = max(longer["value"] or 0, 1 - (longer["value"] or 0))
    alone = f"Always taking {rule} would be right in {share:.1%}"
    span = format_interval(balanced)
    counts = {
        word: sum(one["pairs"] for one in bins if sign * one["low"] > 0)
        for word, sign in (("longer", 1), ("shorter", -1))
    }
    rarer = min(counts, key=lambda word: counts[word])
    if balanced["low"] <= 0.5 < accuracy["low"] and counts[rarer] < MIN_SIDE_PAIRS:
        return [
            f"{alone}; the chosen answer is {rarer} in {counts[rarer]} of {sum(counts.values())} pairs of "
            "unlike lengths, too few to tell whether it is length alone."
        ]
    if balanced["low"] > 0.5:
        return [
            f"{alone}; with lengths balanced the accuracy is still above that of a coin, {span}: it is not "
            "length alone."
        ]
    if accuracy["low"] > 0.5:
        return [
            f"{alone}; with lengths balanced the accuracy, {span}, may be that of a coin: it may be length "
            "alone."
        ]
    return []


def conclude_win_rate(answers: Mapping[str, Any]) -> str:
    rate, other = answers["win_rate"]["length_controlled"], answers["against"]
    opponent = "the chosen answers" if other == "chosen" else "the reference's answers"
    low, high, span = rate["low"], rate["high"], format_interval(rate)
    if low is None or high is None:
        return "One prompt is answered, so that nothing can be said about others: take more (--num-samples)."
    if low <= 0.5 <= high:
        return f"At equal length the judge prefers neither the model's answers nor {opponent}: {span}."
    better = "the model's answers" if low > 0.5 else opponent
    worse = opponent if low > 0.5 else "the model's answers"
    return f"At equal length the judge prefers {better} to {worse}: the model wins {span}."


def format_interval(figure: Interval, template: str = "{:.1%}") -> str:
    """A number with its interval, as in '60.0% (51.2% to 68.1%)'."""
    value, low, high = (figure[name] for name in ("value", "low", "high"))
    if value is None:
        return "-"
    number = template.format(value)
    return number if low is None else f"{number} ({template.format(low)} to {template.format(high)})"
