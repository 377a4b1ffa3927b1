"""Sample answers to prompts batch by batch, and let a judge score them; what is done stands in a file."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dpo_wrapper.commands.pairs.logs import LoggedAnswer
from dpo_wrapper.commands.pairs.progress_file import ProgressFile
from dpo_wrapper.commands.pairs.rows import Sample
from dpo_wrapper.data.tokens.tokenizers import Tokenizer
from dpo_wrapper.display.terminal import print_line
from dpo_wrapper.evaluation.generate import generate, list_end_ids
from dpo_wrapper.evaluation.judges import Judge
from dpo_wrapper.evaluation.padding import computes_padding_alike
from dpo_wrapper.evaluation.sampling import Sampling, derive_seed

ProgressCallback = Callable[[int], object]

PROMPTS_PER_SCORING = 16
"""Prompts whose samples are scored, and their scores written, at once."""

Place = tuple[int, int]
"""Number of a prompt, and of a sample of it."""


@dataclass(frozen=True)
class Sampler:
    """What writes answers, and how.

    Attributes:
        model: as in `generate`, on its device.
        sampling: how tokens are drawn; None for greedy answers.
        batch_size: number of answers that are written at once.
    """

    model: nn.Module
    tokenizer: Tokenizer
    sampling: Sampling | None
    max_new_tokens: int
    batch_size: int

    def sample_all(
        self,
        answers: Sequence[LoggedAnswer],
        samples_per_prompt: int,
        file: ProgressFile,
        progress: ProgressCallback,
    ) -> list[list[Sample]]:
        """The samples of each prompt: those that a file has, and the others, which are added to it.

        `progress` is called with the number of answers that were just written.

        Raises:
            ValueError: the accelerator's memory does not suffice.
        """
        lengths = [len(answer.prompt_ids) for answer in answers]
        batches = plan_batches(lengths, samples_per_prompt, self.batch_size)
        done = {record["batch"]: record["samples"] for record in file.records if "batch" in record}
        samples: dict[Place, Sample] = {}
        pads: bool | None = None
        for number, places in enumerate(batches):
            if number not in done:
                if pads is None:
                    pads = self.can_pad(answers)
                written = self.sample_batch([answers[row] for row, _ in places], places, pads)
                done[number] = [vars(sample) for sample in written]
                file.append({"batch": number, "samples": done[number]})
                progress(len(places))
            samples.update(zip(places, (Sample(**one) for one in done[number]), strict=True))
        return [[samples[row, k] for k in range(samples_per_prompt)] for row in range(len(answers))]

    def can_pad(self, answers: Sequence[LoggedAnswer]) -> bool:
        """Whether prompts of different lengths can share a batch; a line says so if they cannot."""
        longest = max((answer.prompt_ids for answer in answers), key=len)
        is_alike = computes_padding_alike(self.model, longest)
        if not is_alike:
            print_line(
                "prompts of different lengths are answered apart: the model computes padding otherwise"
            )
        return is_alike

    def sample_batch(
        self, answers: Sequence[LoggedAnswer], places: Sequence[Place], pads: bool
    ) -> list[Sample]:
        sampling, seeds = self.sampling, None
        if sampling is not None:
            seeds = [derive_seed(sampling.seed, *place) for place in places]
        end_ids = list_end_ids(self.tokenizer)
        prompts = [answer.prompt_ids for answer in answers]
        options: dict[str, Any] = {"sampling": sampling, "seeds": seeds, "pads": pads}
        try:
            completions = generate(self.model, prompts, self.max_new_tokens, end_ids, **options)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"the memory should hold the keys and values of {len(prompts)} answers of "
                f"{self.max_new_tokens:,} tokens and their prompts, but it does not: lower --batch-size or "
                "--max-length."
            ) from error
        samples = []
        for number, (answer, ids) in enumerate(zip(answers, completions, strict=True)):
            text = answer.clean_answer(self.tokenizer.decode(ids))
            seed = None if seeds is None else seeds[number]
            samples.append(Sample(text, seed, is_cut=ids[-1] not in end_ids))
        return samples


def plan_batches(lengths: Sequence[int], samples_per_prompt: int, batch_size: int) -> list[list[Place]]:
    """Which samples are written at once: full batches of similar prompts, the longest first.

    Args:
        lengths: of the prompts.
        samples_per_prompt: number of samples of each.
        batch_size: number of samples in a batch; the last one may have fewer.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    places = [(row, number) for row in order for number in range(samples_per_prompt)]
    return [places[start : start + batch_size] for start in range(0, len(places), batch_size)]


def score_all(
    judge: Judge,
    identity: Any,
    answers: Sequence[LoggedAnswer],
    samples: Sequence[Sequence[Sample]],
    file: ProgressFile,
    progress: ProgressCallback,
) -> list[list[float]]:
    """The scores of each prompt's samples: those that a file has, and the others, which are added to it.

    `identity` tells this judge from what it was before, whose scores in the file do not count.
    """
    own = [record for record in file.records if "first" in record and record["judge"] == identity]
    done = {record["first"]: record["scores"] for record in own}
    scores: list[list[float]] = []
    for first in range(0, len(answers), PROMPTS_PER_SCORING):
        rows = range(first, min(first + PROMPTS_PER_SCORING, len(answers)))
        texts = [[sample.text for sample in samples[row]] for row in rows]
        if first not in done:
            prompts = [answers[row].example.prompt for row in rows for _ in samples[row]]
            flat = judge.score(prompts, [text for of_row in texts for text in of_row])
            done[first] = list(split_like(flat, texts))
            file.append({"first": first, "scores": done[first], "judge": identity})
            progress(len(rows))
        scores += done[first]
    return scores


def split_like(values: Sequence[Any], parts: Sequence[Sequence[Any]]) -> Iterator[list[Any]]:
    """The values in consecutive lists as long as the parts."""
    start = 0
    for part in parts:
        yield list(values[start : start + len(part)])
        start += len(part)
