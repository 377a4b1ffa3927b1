"""`dpo-wrapper pairs LOGS --out FILE`: sample answers to the prompts of logs, and write pairs."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from torch import nn

from dpo_wrapper.commands.evaluate.eval_pairs import take_run_options
from dpo_wrapper.commands.pairs.config import PairsConfig
from dpo_wrapper.commands.pairs.job import PairsJob, describe_judge, progress_path
from dpo_wrapper.commands.pairs.logs import LoggedAnswer, Logs, encode_logs
from dpo_wrapper.commands.pairs.progress_file import ProgressFile
from dpo_wrapper.commands.pairs.rows import (
    REASONS,
    Row,
    Sample,
    drop_repeated,
    make_judged_row,
    make_recorded_row,
)
from dpo_wrapper.commands.pairs.samples import Sampler, score_all
from dpo_wrapper.data import TokenizedExample
from dpo_wrapper.data.example_table import ExampleTable, TableRow
from dpo_wrapper.data.files import find_sources
from dpo_wrapper.data.prepared import is_prepared
from dpo_wrapper.data.readers import ReadExamples, read_examples
from dpo_wrapper.data.whole_files import write_whole
from dpo_wrapper.display.terminal import create_progress_bar, print_line
from dpo_wrapper.evaluation.judges import Judge, load_judge
from dpo_wrapper.evaluation.model_limits import check_limits
from dpo_wrapper.evaluation.model_pair import ModelPair, load_model_pair
from dpo_wrapper.pretrained import read_run


def make_pairs(options: PairsConfig) -> None:
    """Write a file of pairs, and print what became of the logs.

    Raises:
        ValueError, TypeError, OSError, ImportError: one sentence about the setting or the row that is wrong.
    """
    if prepared := next(filter(is_prepared, options.data), None):
        problem = f"logs should be files of rows, but {prepared} is prepared data, which holds tokens"
        raise ValueError(f"{problem}: name the files that it was made of.")
    if options.out.exists():
        inputs = {os.path.realpath(source.path) for source in find_sources(options.data)}
        if os.path.realpath(options.out) in inputs:
            problem = f"--out should be a new file, but {options.out} is one of the logs"
            raise ValueError(f"{problem}: name another.")
        problem = f"--out should be a new file, but {options.out} is there and finished"
        raise ValueError(f"{problem}: name another, or delete it.")
    job = PairsJob.plan(options)
    config: Any
    config, run_notes = take_run_options(options, read_run(Path(options.model)))
    read = read_examples(
        config.data, config.fields, split=config.split, on_error=config.on_error, kind="prompt_completion"
    )
    pair, judge, logs = load_parts(config, job.today, read)
    for line in [*run_notes, *read.notes(), *format_log_notes(logs)]:
        print_line(line)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with ProgressFile(progress_path(config.out), job.settings) as file:
        samples = sample_answers(config, pair, logs.answers, file)
        rows = make_rows(config, pair, judge, logs.answers, samples, file)
        counts = Counter(row for row in rows if isinstance(row, str))
        if len(rows) == counts.total():
            reasons = "; ".join(format_reasons(counts, len(rows))) or "no prompt is left"
            raise ValueError(f"the logs should give at least one pair, but they give none: {reasons}.")
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows if not isinstance(row, str)]
        write_whole(config.out, "".join(lines))
        file.remove()
    print_line(f"{config.out} has {len(lines):,} {'pairs' if config.keep == 'pair' else 'lists'}.")
    for line in [*format_reasons(counts, len(rows)), *format_sample_notes(config, samples, judge)]:
        print_line(f"{line}.")


def load_parts(
    config: PairsConfig, today: date | None, read: ReadExamples
) -> tuple[ModelPair, Judge | None, Logs]:
    """The model with its reference, the judge if there is one, and the prompts as the model's tokens."""
    pair = load_model_pair(
        config.model,
        None if config.sample_from == "reference" else "none",
        tokenizer=config.tokenizer,
        max_length=config.max_length,
        tokenizer_options=config.tokenizer_options(today),
        **config.loading,
    )
    judge = None if config.judge is None else load_judge(config.judge, **config.loading)
    logs = encode_logs(
        read.examples,
        pair.tokenizer,
        config.find_prompt_length(pair.policy.max_positions),
        as_chat=config.as_chat_option,
        on_long=config.on_long,
        on_error=config.on_error,
        needs_answer=judge is None and not config.allow_empty,
    )
    prompts = [
        TableRow(TokenizedExample(answer.prompt_ids, ((0,),), source=answer.example.source))
        for answer in logs.answers
    ]
    check_limits(pair.policy, ExampleTable.from_rows(prompts))
    return pair, judge, logs


def make_rows(
    config: PairsConfig,
    pair: ModelPair,
    judge: Judge | None,
    answers: Sequence[LoggedAnswer],
    samples: Sequence[Sequence[Sample]],
    file: ProgressFile,
) -> list[Row | str]:
    """The row of each prompt, or the reason why there is none."""
    provenance = describe_sampling(config, pair)
    if judge is None:
        return [
            make_recorded_row(answer.example, sample, provenance, allow_empty=config.allow_empty)
            for answer, [sample] in zip(answers, samples, strict=True)
        ]
    compared = [drop_repeated(of_prompt, allow_empty=config.allow_empty) for of_prompt in samples]
    identity = describe_judge(judge.name)
    print_line(f"judging {sum(map(len, compared)):,} answers by {judge.name}")
    with create_progress_bar("judging", "prompt", total=len(answers)) as bar:
        scores = score_all(judge, identity, answers, compared, file, bar.update)
    provenance["judge"] = judge.name
    return [
        make_judged_row(answer.example, of_prompt, of_scores, provenance, config.keep)
        for answer, of_prompt, of_scores in zip(answers, compared, scores, strict=True)
    ]


def sample_answers(
    config: PairsConfig, pair: ModelPair, answers: Sequence[LoggedAnswer], file: ProgressFile
) -> list[list[Sample]]:
    """The samples of each prompt."""
    with open_model(config, pair) as model:
        sampler = Sampler(
            model,
            pair.tokenizer,
            config.sampling,
            config.answer_length,
            config.batch_size,
        )
        count = config.samples_per_prompt
        total = count * len(answers)
        done = sum(len(record["samples"]) for record in file.records if "batch" in record)
        origin = config.model if config.sample_from == "policy" else pair.description.rstrip(".")
        given = f", {done:,} of which are there" if done else ""
        print_line(f"sampling {total:,} answers to {len(answers):,} prompts from {origin}{given}")
        with create_progress_bar("sampling", "answer", total=total, initial=done) as bar:
            return sampler.sample_all(answers, count, file, bar.update)


@contextmanager
def open_model(config: PairsConfig, pair: ModelPair) -> Iterator[nn.Module]:
    """The context in which the model that answers is what it should be."""
    if config.sample_from == "policy":
        yield pair.policy.model
        return
    with pair.reference_model() as reference:
        if reference is None:
            raise ValueError(
                "--sample-from reference should be given with a run that has a reference, but that of "
                f"{config.model} is {pair.description.removeprefix('reference: ').rstrip('.')}: name the "
                "model that should answer by --model."
            )
        yield reference


def describe_sampling(config: PairsConfig, pair: ModelPair) -> dict[str, Any]:
    """What the samples of all rows have in common, as their rows say it."""
    description = None if config.sample_from == "policy" else pair.description
    names = ("temperature", "top_p", "top_k", "seed")
    return {
        "model": config.model,
        "sample_from": config.sample_from,
        **({} if description is None else {"reference": description}),
        "sampling": {name: getattr(config, name) for name in names}
        | {"max_new_tokens": config.answer_length},
    }


def format_log_notes(logs: Logs) -> list[str]:
    """Sentences on logs that are left out, and on prompts that are cut."""
    dropped, cut = logs.counts["dropped"], logs.counts["cut"]
    total = f"{len(logs.answers) + dropped:,} prompts"
    tokens = f"{logs.max_length:,} tokens"
    notes = []
    if logs.errors:
        notes.append(
            f"{len(logs.errors):,} rows cannot be used and are left out; the first: {logs.errors[0]}"
        )
    if dropped:
        notes.append(f"{dropped:,} of {total} have more than {tokens} and are left out.")
    if cut:
        notes.append(f"{cut:,} of {total} have more than {tokens}, of which the model sees the last.")
    return notes


def format_sample_notes(
    config: PairsConfig, samples: Sequence[Sequence[Sample]], judge: Judge | None
) -> list[str]:
    """Sentences on answers that are cut, without their full stop."""
    flat = [sample for of_prompt in samples for sample in of_prompt]
    notes = []
    if cut := sum(sample.is_cut for sample in flat):
        limit = f"--max-new-tokens {config.answer_length}"
        notes.append(f"{cut:,} of {len(flat):,} sampled answers are cut at {limit}")
    if judge is not None and judge.num_cut:
        notes.append(f"{judge.num_cut:,} answers were cut for the judge, whose model reads no more")
    return notes


def format_reasons(counts: Counter[str], total: int) -> list[str]:
    """Why prompts have no row, as sentences without their full stop."""
    return [
        f"{counts[reason]:,} of {total:,} prompts give no pair: {words}"
        for reason, words in REASONS.items()
        if counts[reason]
    ]
