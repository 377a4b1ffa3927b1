"""Answers of a model and of its reference to prompts of the data: written, judged, and how far they part."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_wrapper.commands.evaluate.config import EvaluateConfig
from dpo_wrapper.commands.evaluate.eval_pairs import EvalPairs
from dpo_wrapper.data import TokenizedExample
from dpo_wrapper.data.whole_files import write_whole
from dpo_wrapper.display.terminal import create_progress_bar
from dpo_wrapper.evaluation.completion_scores import score_completions
from dpo_wrapper.evaluation.generate import generate, list_end_ids
from dpo_wrapper.evaluation.judges import Judge
from dpo_wrapper.evaluation.model_pair import ModelPair
from dpo_wrapper.evaluation.padding import computes_padding_alike
from dpo_wrapper.evaluation.prompts import Prompt, format_prompt
from dpo_wrapper.evaluation.sampling import Sampling, derive_seed
from dpo_wrapper.evaluation.statistics.bootstrap import mean_of
from dpo_wrapper.evaluation.statistics.figures import CONFIDENCE, Resampling, as_json
from dpo_wrapper.evaluation.statistics.win_rate import compare_answers

Record = dict[str, Any]

CHUNK_SIZE = 16
"""Prompts whose answers are written to the file at once."""


@dataclass(frozen=True)
class Question:
    """A prompt of the data.

    Attributes:
        ids: its tokens.
        chosen: the tokens of the answer that the data prefers.
        prompt: as the row has it; None where the data was prepared.
        source: the place of the row.
    """

    ids: list[int]
    chosen: tuple[int, ...]
    prompt: Prompt | None
    source: str


def find_questions(pairs: EvalPairs, max_questions: int, max_length: int | None) -> list[Question]:
    """The first prompts that differ; `max_length` tokens of each at most, from its end."""
    _, first = np.unique(pairs.prompt_digests, return_index=True)
    questions = []
    for index in np.sort(first)[:max_questions].tolist():
        example = pairs.examples[index]
        ids = list(example.prompt if max_length is None else example.prompt[-max_length:])
        prompt = pairs.originals[index].prompt if pairs.originals else None
        questions.append(Question(ids, example.chosen, prompt, example.source))
    return questions


class Answers:
    """Answers to questions, which are kept in a file from one chunk to the next.

    Args:
        pair: the model and its reference.
        questions: the prompts.
        config: how answers are sampled, and what they are compared with.
        file: samples.jsonl, whose first lines may be there already.
    """

    def __init__(
        self, pair: ModelPair, questions: Sequence[Question], config: EvaluateConfig, file: Path
    ) -> None:
        self.pair, self.questions, self.config, self.file = pair, questions, config, file
        self.pads: dict[str, bool] = {}  # by whose answers they are: whether padding changes nothing
        self.against = choose_opponent(pair, config)

    def take(self) -> list[Record]:
        """The answers to all questions; whole chunks of them that are in the file are not taken again."""
        records, total = read_lines(self.file), len(self.questions)
        if len(records) != total:  # a chunk is taken as a whole: its padding may change how logits round
            records = records[: min(len(records), total) // CHUNK_SIZE * CHUNK_SIZE]
        write_lines(self.file, records)
        with (
            create_progress_bar("answering prompts", "prompt", total=total, initial=len(records)) as bar,
            self.file.open("a", encoding="utf-8") as stream,
        ):
            while len(records) < total:
                new = list(self.answer(len(records)))
                stream.writelines(format_line(record) for record in new)
                stream.flush()
                records += new
                bar.update(len(new))
        return records

    def answer(self, start: int) -> Iterator[Record]:
        """The answers to the questions of a chunk."""
        chunk = self.questions[start : start + CHUNK_SIZE]
        seeds = [derive_seed(self.config.seed, start + k) for k in range(len(chunk))]
        answers = self.generate("policy", self.pair.policy.model, chunk, seeds)
        others: Sequence[Sequence[int]] = [question.chosen for question in chunk]
        if self.against == "reference" and self.config.judge is not None:
            with self.pair.reference_model() as reference:
                others = self.generate("reference", reference, chunk, seeds)
        decode = self.pair.tokenizer.decode
        for question, ids, other in zip(chunk, answers, others, strict=True):
            prompt = decode(question.ids) if question.prompt is None else format_prompt(question.prompt)
            record = {"source": question.source, "prompt": prompt, "policy": decode(ids), "policy_ids": ids}
            yield record | {self.against: decode(other)}

    def generate(
        self, role: str, model: Any, chunk: Sequence[Question], seeds: Sequence[int]
    ) -> list[list[int]]:
        """The answers of policy or reference, of prompts of all lengths together where padding allows it."""
        temperature = self.config.temperature
        if role not in self.pads:
            longest = max((question.ids for question in self.questions), key=len)
            self.pads[role] = computes_padding_alike(model, longest)
        try:
            return generate(
                model,
                [question.ids for question in chunk],
                self.config.max_new_tokens,
                list_end_ids(self.pair.tokenizer),
                sampling=Sampling(temperature=temperature) if temperature else None,
                seeds=seeds,
                pads=self.pads[role],
                max_positions=self.pair.max_positions,
            )
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"the memory should hold the keys and values of {len(chunk)} answers of "
                f"{self.config.max_new_tokens:,} tokens and their prompts, but it does not: lower "
                "--max-new-tokens or --max-length."
            ) from error

    def judge(self, judge: Judge, records: list[Record]) -> None:
        """Add the judge's scores to the records, and write them."""
        prompts = [question.prompt for question in self.questions]
        assert None not in prompts
        names = ("policy", self.against)
        with create_progress_bar("judging answers", "answer", total=2 * len(records)) as bar:
            scores = [judge.score(prompts, [r[name] for r in records], bar.update) for name in names]  # type: ignore[arg-type]
        for record, *values in zip(records, *scores, strict=True):
            record["judge"] = dict(zip(names, values, strict=True))
        write_lines(self.file, records)

    def describe(self, records: list[Record]) -> dict[str, Any]:
        """The figures of the answers, as evaluation.json has them."""
        config, count = self.config, len(records)
        resampling = Resampling(np.arange(count), config.resamples, config.seed)
        statistics = {"length/samples": mean_of(np.array([len(r["policy_ids"]) for r in records], float))}
        if self.pair.has_reference and config.temperature == 1:
            scores = score_completions(self.pair.dpo, self.as_examples(records), config.micro_batch_tokens)
            assert scores.reference is not None and scores.token_kl is not None
            statistics["kl/samples"] = mean_of(scores.policy - scores.reference)
            statistics["kl/samples_k3"] = mean_of(scores.token_kl)
        content: dict[str, Any] = {"prompts": count, "against": self.against}
        content["figures"] = as_json(resampling.estimate(statistics))
        if count and "judge" in records[0]:
            names = ("policy", self.against)
            scores_by_side = [np.array([r["judge"][name] for r in records]) for name in names]
            lengths = [np.array([len(r[name]) for r in records], float) for name in names]
            rates = compare_answers(
                *scores_by_side,
                *lengths,
                num_resamples=config.resamples,
                confidence=CONFIDENCE,
                seed=config.seed,
            )
            content |= {"judge": config.judge, "win_rate": as_json(vars(rates))}
        return content

    def as_examples(self, records: Sequence[Record]) -> list[TokenizedExample]:
        return [
            TokenizedExample(tuple(question.ids), (tuple(record["policy_ids"]),))
            for question, record in zip(self.questions, records, strict=True)
        ]


def choose_opponent(pair: ModelPair, config: EvaluateConfig) -> str:
    """Whose answers those of the model are compared with: 'reference' or 'chosen'.

    Raises:
        ValueError: it should be the reference, but there is none.
    """
    if config.against == "reference" and not pair.has_reference:
        raise ValueError(
            f"--against reference needs a reference, but there is none ({pair.description.rstrip('.')}): "
            "name one by --reference, or give --against chosen."
        )
    return config.against or ("reference" if pair.has_reference else "chosen")


def read_lines(file: Path) -> list[Record]:
    """The whole lines of a file; none if it is not there."""
    if not file.exists():
        return []
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]


def write_lines(file: Path, records: Sequence[Record]) -> None:
    """Write a file completely or not at all."""
    write_whole(file, "".join(map(format_line, records)))


def format_line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
