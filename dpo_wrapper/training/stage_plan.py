"""Which stages a run has, and what each of them is trained on."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_wrapper.data.collate import add_kl_completions
from dpo_wrapper.data.errors import ExampleError
from dpo_wrapper.data.example_table import ExampleTable
from dpo_wrapper.data.example_view import COMPLETION, ExampleView, view_completions, view_preferences
from dpo_wrapper.data.examples import PREFERENCE_TYPES, DatasetType, TokenizedExample
from dpo_wrapper.data.trained_prompts import PromptDigests, read_trained_prompts
from dpo_wrapper.losses import CombinedLoss
from dpo_wrapper.training.config import STAGES, StageName, TrainConfig, flag

UNITS = {
    "preference": "pairs",
    "ranked": "lists",
    "unpaired_preference": "rows",
    "prompt_completion": "completions",
    "language_modeling": "documents",
}
"""What examples of each dataset type are called in what is printed and logged."""

SFT_OPTIONS = ("sft_epochs", "sft_learning_rate", "train_on_prompt")
PRETRAIN_OPTIONS = ("pretrain_epochs", "pretrain_learning_rate")
DPO_OPTIONS = (
    "epochs", "learning_rate", "loss", "reference", "reference_dtype", "reference_device", "ranking",
    "precompute_ref_log_probs", "ref_model_sync_steps", "ref_model_mixup_alpha", "ld_alpha", "wpo",
    "exact_answers",
)  # fmt: skip
"""Options that one stage alone reads."""


@dataclass(frozen=True)
class Splits:
    """Examples to train and to evaluate on; `unit` is what they are: pairs, lists, rows or documents."""

    train: Sequence[TokenizedExample]
    eval: Sequence[TokenizedExample]
    unit: str


@dataclass(frozen=True)
class StagePlan:
    """A stage, how long it takes, and what it is trained on.

    Attributes:
        epochs: passes over the examples, unless --max-steps allows fewer.
        num_steps: number of optimizer steps.
        learning_rate: peak of the stage.
        trained_prompts: all that the model has been trained on after the stage, in earlier runs too.
    """

    name: StageName
    epochs: int
    num_steps: int
    learning_rate: float
    splits: Splits
    trained_prompts: PromptDigests


def choose_stages(config: TrainConfig, types: Collection[DatasetType]) -> tuple[StageName, ...]:
    """The stages of a run on data of these types.

    Raises:
        ValueError: the data holds nothing for a stage, or an option is of a stage that the run has not.
    """
    has_preferences = not set(PREFERENCE_TYPES).isdisjoint(types)
    stages = config.stage
    if stages is None:
        learns_best = config.sft_epochs is not None or config.is_new_model  # the best completions first
        has_sft = (
            "prompt_completion" in types or (has_preferences and learns_best)
        ) and config.sft_epochs != 0
        has_stage: dict[StageName, bool] = {
            "pretrain": "language_modeling" in types,
            "sft": has_sft,
            "dpo": has_preferences and config.epochs != 0,
        }
        stages = tuple(stage for stage in STAGES if has_stage[stage])
    elif "dpo" in stages and not has_preferences:
        problem = (
            f"--stage dpo should have preferences, but the data holds {' and '.join(sorted(types))} alone"
        )
        raise ValueError(f"{problem}: leave dpo out, or add rows with 'chosen' and 'rejected'.")
    for stage, option in (("sft", "sft_epochs"), ("dpo", "epochs")):
        if stage in stages and getattr(config, option) == 0:
            remedy = "leave one of the two out"
            raise ValueError(f"{flag(option)} should not be 0 if --stage names {stage}: {remedy}.")
    if not stages and has_preferences:
        raise ValueError("--epochs should not be 0 where no other stage is left: raise it or --sft-epochs.")
    if not stages:
        raise ValueError("--sft-epochs should not be 0 for data of prompt_completion alone: leave it out.")
    options = {"pretrain": PRETRAIN_OPTIONS, "sft": SFT_OPTIONS, "dpo": DPO_OPTIONS}
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    no_stage = [name for name in ("sft_epochs", "epochs") if getattr(config, name) == 0]
    for stage, names in options.items():
        given = [name for name in names if getattr(config, name) != defaults[name] and name not in no_stage]
        if stage not in stages and given:
            has = f"the stages of this run are {', '.join(stages)}"
            own = f"{stages[-1]}_{given[0]}"
            remedy = f"give {flag(own)}" if own in defaults else "leave it out"
            raise ValueError(f"{flag(given[0])} is an option of the stage {stage}, but {has}: {remedy}.")
    return stages


def plan_stages(
    config: TrainConfig,
    stages: Sequence[StageName],
    loss: CombinedLoss,
    train: tuple[ExampleTable, NDArray[np.int64]],
    eval: tuple[ExampleTable, NDArray[np.int64]],
) -> tuple[list[StagePlan], list[ExampleError]]:
    """The stages with their examples, and the errors of preferences that are left out.

    Args:
        loss: of preference training.
        train, eval: tables with the rows to train and to evaluate on.

    Raises:
        ExampleError: a row cannot become what the loss learns from.
    """
    epochs: dict[StageName, int] = {
        "pretrain": config.pretrain_epochs,
        "sft": (5 if config.is_new_model else 1) if config.sft_epochs is None else config.sft_epochs,
        "dpo": config.epochs,
    }
    dataset_type: Any = loss.dataset_type
    learns_prompts = config.train_on_prompt
    if learns_prompts is not None and (train[0].dataset_types[train[1]] == COMPLETION).any():
        problem = "--train-on-prompt acts where preferences are imitated, but the data has prompt_completion"
        raise ValueError(f"{problem} rows of its own: leave it out.")
    if learns_prompts is None:
        learns_prompts = config.is_new_model and "pretrain" not in stages

    def view(stage: StageName, table: ExampleTable, rows: NDArray[np.int64]) -> ExampleView:
        if stage == "pretrain":
            return view_completions(table, rows, "language_modeling", is_document=True)
        if stage == "sft":
            return view_completions(table, rows, "prompt_completion", is_document=learns_prompts)
        options: dict[str, Any] = {"ranking": config.ranking or "all", "on_error": config.on_error}
        examples, skipped = view_preferences(table, rows, dataset_type, **options)
        errors.extend(skipped)
        return examples

    errors: list[ExampleError] = []
    types: dict[StageName, Any] = {"pretrain": "language_modeling", "sft": "prompt_completion"}
    add_partners = partial(add_kl_completions, max_length=config.max_length, seed=config.seed)
    trained_prompts, plans = read_earlier_prompts(config), []
    for stage in stages:
        unit = UNITS[types.get(stage, dataset_type)]
        examples, eval_examples = view(stage, *train), view(stage, *eval)
        splits = Splits(add_partners(examples), add_partners(eval_examples), unit)
        trained_prompts = np.union1d(trained_prompts, train[0].column("prompt_digest")[examples.rows])
        num_steps = epochs[stage] * math.ceil(len(splits.train) / config.batch_size)
        num_steps = min(num_steps, config.max_steps or num_steps)
        learning_rate = config.peak_learning_rate(stage, num_steps)
        plans.append(StagePlan(stage, epochs[stage], num_steps, learning_rate, splits, trained_prompts))
    return plans, errors


def read_earlier_prompts(config: TrainConfig) -> PromptDigests:
    """What the model was trained on before the run, as far as its folder and that of its adapter say."""
    folders = [] if config.is_new_model else [config.model, config.adapter]
    known = [read_trained_prompts(Path(folder)) for folder in folders if folder is not None]
    return np.concatenate([np.zeros(0, np.uint64), *(digests for digests in known if digests is not None)])
