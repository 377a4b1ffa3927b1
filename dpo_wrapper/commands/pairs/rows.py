"""Samples -> rows of preferences, which `data` reads without any option."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpo_wrapper.data.examples import Example
from dpo_wrapper.data.rows.dialogues import Completion
from dpo_wrapper.data.rows.messages import Turns, answer_turns

Keep = Literal["pair", "list"]

EQUAL = "equal"
EMPTY = "empty"
TIED = "tied"
REASONS = {
    EQUAL: "the sample equals the recorded answer",
    EMPTY: "the samples are empty",
    TIED: "all samples are equal or tied",
}
"""Why a prompt has no row."""


@dataclass(frozen=True)
class Sample:
    """An answer that a model wrote.

    Attributes:
        text: of the answer.
        seed: of its random numbers; None if it is greedy.
        is_cut: whether it has no end, because it has as many tokens as were allowed.
    """

    text: str
    seed: int | None
    is_cut: bool

    def as_provenance(self, score: float | None = None) -> dict[str, Any]:
        scored = {} if score is None else {"score": score}
        return {"from": "sample", "seed": self.seed, "is_cut": self.is_cut, **scored}


Row = dict[str, Any]


def make_recorded_row(
    example: Example, sample: Sample, provenance: Mapping[str, Any], *, allow_empty: bool = False
) -> Row | str:
    """The pair of the recorded answer, chosen, and a sample, rejected; or the reason why there is none."""
    if not (sample.text.strip() or allow_empty):
        return EMPTY
    [recorded] = example.completions
    if isinstance(recorded, str) and recorded.strip() == sample.text.strip():
        return EQUAL
    origins = [{"from": "log"}, sample.as_provenance()]
    return make_row(example, (recorded, sample.text), origins, provenance)


def make_judged_row(
    example: Example,
    samples: Sequence[Sample],
    scores: Sequence[float],
    provenance: Mapping[str, Any],
    keep: Keep = "pair",
) -> Row | str:
    """The row of samples in the order of their scores, or the reason why there is none.

    Args:
        example: whose prompt was answered.
        samples: none of which has the text of another.
        scores: of each sample; a better one has a larger score.
        provenance: what all samples of the row have in common.
        keep: 'pair' for the best against the worst, of equal ones the first; 'list' for all.
    """
    if not samples:
        return EMPTY
    if len(set(scores)) == 1:
        return TIED
    order = sorted(range(len(samples)), key=lambda number: -scores[number])
    if keep == "pair":
        order = [order[0], scores.index(min(scores))]
    texts = tuple(samples[number].text for number in order)
    origins = [samples[number].as_provenance(scores[number]) for number in order]
    ordered = [scores[number] for number in order] if keep == "list" else None
    return make_row(example, texts, origins, provenance, ordered)


def drop_repeated(samples: Sequence[Sample], *, allow_empty: bool = False) -> list[Sample]:
    """The samples that can be compared: the first of each text, without empty ones."""
    first: dict[str, Sample] = {}
    for sample in samples:
        if sample.text.strip() or allow_empty:
            first.setdefault(sample.text, sample)
    return list(first.values())


def make_row(
    example: Example,
    completions: Sequence[Completion],
    origins: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any],
    scores: Sequence[float] | None = None,
) -> Row:
    """A row with the completions, the best first, as a pair, or with scores as a ranked list."""
    is_dialogue = not isinstance(example.prompt, str)
    values = [write_completion(completion, is_dialogue) for completion in completions]
    row: Row = {"prompt": example.prompt if isinstance(example.prompt, str) else write_turns(example.prompt)}
    if scores is None:
        row |= {"chosen": values[0], "rejected": values[1]}
    else:
        row |= {"completions": values, "scores": list(scores)}
    columns = {"tools": list(example.tools) or None, "split": example.split, "weight": example.weight}
    row |= {name: value for name, value in columns.items() if value is not None}
    row["provenance"] = {"source": example.source, **provenance, "completions": list(origins)}
    return row


def write_completion(completion: Completion, is_dialogue: bool) -> Any:
    return write_turns(answer_turns(completion)) if is_dialogue else completion


def write_turns(turns: Turns) -> list[dict[str, Any]]:
    return [turn.as_dict() for turn in turns]
