"""How many prompts a model answers with exactly the chosen completion."""

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from dpo_wrapper.data import TokenizedExample
from dpo_wrapper.evaluation.generate import cut_at_end, generate

MAX_ANSWER_TOKENS = 32
"""The longest chosen completion, with its end token, that a model is expected to give exactly."""

MIN_SHORT_FRACTION = 0.9
"""The fraction of prompts that need so short a chosen completion for the rate to say something."""


class ExactAnswers:
    """The prompts of some examples, and how many of them a model answers exactly.

    Answers are greedy. An exact one has the tokens of the chosen completion, and ends with it.

    Attributes:
        examples: the first `max_prompts` that have prompts of their own, without those whose chosen
            completion is long or does not end; none where a tenth of them or more is left out.
    """

    def __init__(
        self,
        examples: Iterable[TokenizedExample],
        max_prompts: int,
        end_ids: Sequence[int],
        max_positions: int | None = None,
    ) -> None:
        self.end_ids, self.max_positions = end_ids, max_positions
        self.examples = select_short_answers(examples, max_prompts, end_ids)

    def measure_rate(self, model: nn.Module, progress: Callable[[int], object] | None = None) -> float:
        """The fraction of the prompts that the model answers exactly; `progress` as in `generate`."""
        answers = [cut_at_end(example.chosen, self.end_ids) for example in self.examples]
        completions = generate(
            model,
            [example.prompt for example in self.examples],
            max(map(len, answers)),
            self.end_ids,
            max_positions=self.max_positions,
            progress=progress,
        )
        is_exact = [completion == answer for completion, answer in zip(completions, answers, strict=True)]
        return sum(is_exact) / len(is_exact)


def select_short_answers(
    examples: Iterable[TokenizedExample], max_prompts: int, end_ids: Sequence[int]
) -> list[TokenizedExample]:
    """The examples of `ExactAnswers`."""
    first: dict[tuple[int, ...], TokenizedExample] = {}
    for example in examples:
        if len(first) >= max_prompts:
            break
        if example.sft_completion and len(example.prompt) > 1:  # more than a BOS
            first.setdefault(example.prompt, example)
    short = [one for one in first.values() if is_short_answer(one.chosen, end_ids)]
    return short if len(short) > MIN_SHORT_FRACTION * len(first) else []


def is_short_answer(completion: Sequence[int], end_ids: Sequence[int]) -> bool:
    answer = cut_at_end(completion, end_ids)
    return len(answer) <= MAX_ANSWER_TOKENS and answer[-1] in end_ids
