"""`dpo-wrapper evaluate`: score the pairs of some data, say what the figures are and how sure they are."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dpo_wrapper.commands.evaluate.answers import Answers, choose_opponent, find_questions, write_lines
from dpo_wrapper.commands.evaluate.conclusions import draw_conclusions
from dpo_wrapper.commands.evaluate.config import EvaluateConfig
from dpo_wrapper.commands.evaluate.eval_pairs import (
    EvalPairs,
    hide_subset,
    select_pairs,
    take_options_of_tokens,
)
from dpo_wrapper.commands.evaluate.evaluation_table import format_evaluation
from dpo_wrapper.data.input_data import InputData
from dpo_wrapper.data.trained_prompts import read_trained_prompts
from dpo_wrapper.data.whole_files import write_whole
from dpo_wrapper.data.writable import check_writable
from dpo_wrapper.display.terminal import (
    create_progress_bar,
    hide_library_bars,
    hide_sharing_warnings,
    print_line,
)
from dpo_wrapper.evaluation.completion_scores import score_completions
from dpo_wrapper.evaluation.judges import Judge, load_judge
from dpo_wrapper.evaluation.model_limits import check_limits
from dpo_wrapper.evaluation.model_pair import ModelPair, load_model_pair
from dpo_wrapper.evaluation.statistics.figures import Resampling, estimate_figures
from dpo_wrapper.evaluation.statistics.pair_scores import PairScores
from dpo_wrapper.losses import CombinedLoss, SimPO
from dpo_wrapper.version import __version__

EVALUATION_FILE, SCORES_FILE, SAMPLES_FILE = "evaluation.json", "scores.jsonl", "samples.jsonl"

Content = dict[str, Any]


def run_evaluation(options: EvaluateConfig) -> Content:
    """Evaluate, print tables and sentences, and write the files; returns the content of evaluation.json.

    The same command again gives the same figures. Answers to prompts that are in the folder are kept, if the
    scores are those that they were taken with.

    Raises:
        ValueError, TypeError, OSError, ImportError: one sentence about the setting or the row that is wrong.
    """
    hide_library_bars()
    config: Any
    config, notes = take_options_of_tokens(options)
    settings = json.loads(json.dumps(asdict(config), default=str))
    before = read_evaluation(config.out, settings)
    judge = None if config.judge is None else load_judge(config.judge, **config.loading)
    data = hide_subset(InputData.open(config.data, config), config)
    check_judged_data(config, data)
    trained_prompts = read_trained_prompts(Path(config.model))
    pair = load_model_pair(
        config.model,
        config.reference,
        tokenizer=config.tokenizer,
        max_length=config.max_length,
        tokenizer_options=config.tokenizer_options(data.today),
        loss=config.loss,
        **config.loading,
    )
    choose_opponent(pair, config)
    pairs = select_pairs(data, pair.tokenizer, config, pair.run, trained_prompts)
    for model in pair.models:
        check_limits(model, pairs.table)
    content: Content = {"version": __version__, "settings": settings, "status": "scoring"}
    reward, has_probability = choose_reward(pair, config.loss)
    content |= {"reference": pair.description, "reward": reward}
    content["rows"] = data.digest(pairs.table)
    content["notes"] = notes + pairs.notes
    if not before:  # whose answers are known by its figures
        write_evaluation(config.out, content)
    print_line("\n".join([content["reference"], f"reward: {content['reward']}.", *content["notes"]]))

    with hide_sharing_warnings():
        content |= score_pairs(pair, pairs, config, has_probability=has_probability)
        if config.sample_count:
            answer_prompts(pair, pairs, judge, config, before, content)
    content["conclusions"] = draw_conclusions(content, pair.has_reference)
    content["status"] = "finished"
    write_evaluation(config.out, content)
    print_line(f"\n{format_evaluation(content)}\n")
    print_line("\n".join(content["conclusions"]))
    if config.out is not None:
        print_line(f"\nAll figures are in {config.out / EVALUATION_FILE}")
    return content


def check_judged_data(config: EvaluateConfig, data: InputData) -> None:
    """Raise ValueError where a judge would get prompts that are there as tokens alone."""
    if config.judge is not None and data.read is None:
        raise ValueError(
            "--judge should be given with files, whose prompts a judge can read, but --data is prepared: "
            "name the files that it was made of."
        )


def choose_reward(pair: ModelPair, loss: str | None) -> tuple[str, bool]:
    """What the reward is, in words, and whether `σ(margin)` is a probability that chosen wins.

    Without a reference it becomes the log-prob per token.
    """
    reward_loss = pair.dpo.loss.reward_loss
    if pair.has_reference and reward_loss is None:
        return f"0.1 times the log-ratio of model and reference, for {pair.loss} has none", True
    if reward_loss is not None and (pair.has_reference or not reward_loss.needs_reference):
        return f"that of {pair.loss}", True
    if loss is not None:
        raise ValueError(
            f"--loss {loss} needs a reference, but there is none ({pair.description.rstrip('.')}): name one "
            "by --reference, or leave the loss out."
        )
    pair.dpo.loss = CombinedLoss(SimPO(beta=1.0, gamma=0.0))
    return "the log-prob per token, for there is no reference", False


def score_pairs(
    pair: ModelPair, pairs: EvalPairs, config: EvaluateConfig, *, has_probability: bool
) -> Content:
    """Score all pairs, write scores.jsonl, and return the figures."""
    try:
        with create_progress_bar("scoring pairs", "pair", total=len(pairs)) as bar:
            scores = score_completions(pair.dpo, pairs.examples, config.micro_batch_tokens, bar.update)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the memory should hold what {config.micro_batch_tokens:,} tokens need, but it does not: lower "
            "--micro-batch-tokens or --max-length."
        ) from error
    by_pair = PairScores.from_completions(scores)
    if config.out is not None:
        write_lines(
            config.out / SCORES_FILE, by_pair.as_records(pairs.examples, pairs.prompt_digests, pairs.subsets)
        )
    resampling = Resampling(pairs.prompt_digests, config.resamples, config.seed)
    return estimate_figures(by_pair, pairs.subsets, resampling, has_probability=has_probability)


def answer_prompts(
    pair: ModelPair,
    pairs: EvalPairs,
    judge: Judge | None,
    config: EvaluateConfig,
    before: Mapping[str, Any],
    content: Content,
) -> None:
    """Answer prompts, judge the answers, and add their figures; what is scored is written before."""
    assert config.out is not None
    content["status"] = "answering"
    positions = pair.max_positions
    longest = None if positions is None else max(1, positions - min(config.max_new_tokens, positions // 2))
    questions = find_questions(pairs, config.sample_count, longest)
    answers = Answers(pair, questions, config, config.out / SAMPLES_FILE)
    if any(before.get(name) != content[name] for name in ("rows", "figures")):
        write_lines(answers.file, [])
    write_evaluation(config.out, content)
    records = answers.take()
    if judge is not None:
        answers.judge(judge, records)
        if judge.num_cut:
            content["notes"].append(f"{judge.num_cut:,} texts were too long for the judge and were cut.")
    content["answers"] = answers.describe(records)


def read_evaluation(out: Path | None, settings: Mapping[str, Any]) -> Content:
    """The evaluation that the same command has written before; empty if there is none.

    Raises:
        ValueError: the folder holds another evaluation, is none, or cannot be written.
    """
    if out is None:
        return {}
    check_writable(out)
    file = out / EVALUATION_FILE
    content: Any = {}
    if file.is_file():
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            content = {}
    present = [name for name in (EVALUATION_FILE, SCORES_FILE, SAMPLES_FILE) if (out / name).exists()]
    if present and content.get("settings") != settings:
        raise ValueError(
            f"--out should be a new folder, or that of an evaluation with the same settings, but {out} holds "
            f"{present[0]} of something else: name another."
        )
    return content


def write_evaluation(out: Path | None, content: Content) -> None:
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / EVALUATION_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
