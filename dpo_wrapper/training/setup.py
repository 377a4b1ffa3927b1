"""Read and check everything that a run needs, before training starts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed

from dpo_wrapper.data import check_ranking
from dpo_wrapper.data.example_table import ExampleTable
from dpo_wrapper.data.input_data import InputData
from dpo_wrapper.evaluation.model_limits import check_limits
from dpo_wrapper.losses import CombinedLoss, parse_losses
from dpo_wrapper.pretrained import PretrainedModel
from dpo_wrapper.reference.build import parse_device
from dpo_wrapper.training.config import TrainConfig, flag
from dpo_wrapper.training.flags_in_errors import flags_in_errors
from dpo_wrapper.training.lora import load_policy, name_adapter
from dpo_wrapper.training.monitoring.trackers import check_trackers
from dpo_wrapper.training.optimizer import create_optimizer, create_schedule, find_optimizer
from dpo_wrapper.training.out_of_memory import advise_on_weights, explain_out_of_memory
from dpo_wrapper.training.policy import resolve_dtype, set_up_policy
from dpo_wrapper.training.processes import check_launcher
from dpo_wrapper.training.read_data import Rows, count_trained_prompts, explain_all_cuts, split_table
from dpo_wrapper.training.run_folder import RunFolder
from dpo_wrapper.training.sharding import find_fsdp_plugin
from dpo_wrapper.training.stage_plan import StagePlan, choose_stages, plan_stages


@dataclass(frozen=True)
class TrainSetup:
    """What a run needs, and notes that are printed when it starts, such as how many rows were left out."""

    config: TrainConfig
    run: RunFolder
    pretrained: PretrainedModel
    stages: list[StagePlan]
    notes: list[str]


@flags_in_errors()
def set_up_training(config: TrainConfig) -> TrainSetup:
    """Read and check everything before training starts.

    Raises:
        ValueError, TypeError, OSError, ImportError: one sentence about the setting or the row that is wrong.
        TrainingError: the model does not fit in memory.
    """
    config = name_adapter(config)
    loss = CombinedLoss(parse_losses(config.loss))
    check_options(config, loss)
    check_trackers(config.report_to)
    check_launcher(config)
    find_fsdp_plugin(config)
    run = RunFolder(config)
    run.check(config.resume)
    data = InputData.open(config.data, config)
    eval_data = None if config.eval_data is None else InputData.open(config.eval_data, config)
    stages = choose_stages(config, data.dataset_types)
    today = data.today or date.fromisoformat(run.record.today)
    run.record.today = today.isoformat()
    config = replace(config, max_length=data.max_length or config.max_length)

    set_seed(config.seed)
    pretrained, policy_notes = load_stage_policy(config, run, run.find_model(stages))
    train, eval, notes = tokenize_splits(data, eval_data, pretrained, config)
    run.check_rows(digest_splits(data, eval_data, train, eval))
    notes = policy_notes + notes
    for table, _ in (train, eval):
        check_limits(pretrained, table)
    if "dpo" in stages:
        dataset_type: Any = loss.dataset_type
        check_ranking(config.ranking, dataset_type, bool((train[0].num_completions() > 2).any()))
    plans, errors = plan_stages(config, stages, loss, train, eval)
    if errors:
        notes.append(f"{len(errors):,} rows are of no use to --loss and are left out; the first: {errors[0]}")
    check_plans(config, loss, plans, [train, eval])
    for plan in plans:
        if config.compares_evaluations and not len(plan.splits.eval):
            name = "keep_best" if config.keep_best else "early_stopping_patience"
            raise ValueError(
                f"{flag(name)} needs {plan.splits.unit} to evaluate on, but there are none: give --eval-data "
                "or a larger --eval-fraction."
            )
        create_schedule(config, plan.learning_rate, num_steps=100)
        create_optimizer(pretrained.model, config, plan.learning_rate, torch.device("cpu"))
    if "dpo" in stages:
        notes += [
            f"{type(term).__name__} compares the pairs of one forward pass with one another: raise "
            "--micro-batch-tokens if a step takes several passes"
            for term, _ in loss.terms
            if not term.is_per_pair
        ]
    if shared := count_trained_prompts(plans[-1].trained_prompts, eval):
        notes.append(
            f"{shared} of the {len(eval[1])} eval examples have prompts that are trained on: their "
            "metrics do not say how the policy does on new prompts."
        )
    return TrainSetup(config, run, pretrained, plans, notes)


def load_stage_policy(
    config: TrainConfig, run: RunFolder, stage_folder: str | None
) -> tuple[PretrainedModel, list[str]]:
    """The model as the run began with it, or as it was after a stage, and notes for the start of the run."""
    with explain_out_of_memory("the model", partial(advise_on_weights, config)):
        pretrained = load_policy(
            config,
            stage_folder,
            config.tokenizer_options(date.fromisoformat(run.record.today)),
            dtype=resolve_dtype(config),
            attn_implementation=config.attn_implementation,
        )
    return pretrained, set_up_policy(pretrained.model, config)


def check_options(config: TrainConfig, loss: CombinedLoss) -> None:
    """Raise ValueError for options that have no effect with these losses or without a reference."""
    loss.check_wpo(config.wpo)
    loss.check_ld_alpha(config.ld_alpha)
    names = ("precompute_ref_log_probs", "ref_model_sync_steps", "reference_dtype", "reference_device")
    flags = [flag(name) for name in names if getattr(config, name)]
    if flags and (config.reference == "none" or not loss.needs_reference):
        why = "--reference is none" if config.reference == "none" else f"--loss {config.loss} needs none"
        raise ValueError(f"{flags[0]} needs a reference, but {why}: leave it out.")
    if config.reference_device is not None:
        parse_device(config.reference_device)
    if config.precision == "fp16" and (config.cpu or not torch.cuda.is_available()):
        raise ValueError(
            "--precision fp16 should run on CUDA, but this run does not: give --precision bf16 or no."
        )
    find_optimizer(config.optimizer)


def tokenize_splits(
    data: InputData, eval_data: InputData | None, pretrained: PretrainedModel, config: TrainConfig
) -> tuple[Rows, Rows, list[str]]:
    """The rows to train and to evaluate on, and sentences on what was left out or not used."""
    table, notes = tokenize(data, pretrained, config)
    if not len(table):
        names = ", ".join(map(str, config.data))
        raise ValueError(
            f"--data should hold rows to train on, but {names} leaves none ({' '.join(notes)}): add rows."
        )
    if eval_data is None:
        seed = config.seed if config.split_seed is None else config.split_seed
        return *split_table(table, config.eval_fraction, seed), notes
    eval_table, eval_notes = tokenize(eval_data, pretrained, config)
    is_test = table.column("split") == "test"
    if count := int(is_test.sum()):
        notes.append(f"{count:,} rows of --data that are marked as test are left out.")
    notes += [f"eval: {note}" for note in eval_notes]
    return (table, np.flatnonzero(~is_test)), (eval_table, np.arange(len(eval_table))), notes


def tokenize(
    data: InputData, pretrained: PretrainedModel, config: TrainConfig
) -> tuple[ExampleTable, list[str]]:
    """The examples as a table, and sentences on what was left out, not used or cut."""
    tokenized = data.tokenize(pretrained.tokenizer, config)
    cuts = explain_all_cuts(tokenized, data.max_length or config.max_length)
    return tokenized.table, tokenized.notes + cuts


def digest_splits(data: InputData, eval_data: InputData | None, train: Rows, eval: Rows) -> dict[str, str]:
    """A hash of the rows of each option that names data."""
    if eval_data is None:
        return {"data": data.digest(*train, eval[1])}
    return {"data": data.digest(*train), "eval_data": eval_data.digest(*eval)}


def check_plans(
    config: TrainConfig, loss: CombinedLoss, plans: Sequence[StagePlan], parts: Sequence[Rows]
) -> None:
    """Raise ValueError if the examples are not what the losses and the stages need."""
    for plan in plans:
        if not len(plan.splits.train) and plan.name == "sft" and config.stage is None:
            raise ValueError(
                "supervised training needs rows with a desirable completion, but there is none to train on: "
                "give --sft-epochs 0."
            )
        if not len(plan.splits.train):
            names = ", ".join(map(str, config.data))
            problem = f"--data should hold {plan.splits.unit} for the stage {plan.name}, but {names} has none"
            raise ValueError(
                f"{problem} to train on: add rows, lower --eval-fraction or leave the stage out."
            )
    if plans[-1].name != "dpo":
        return
    loss.check_columns(*(any(table.has_values(name) for table, _ in parts) for name in ("margin", "weight")))
    for examples in (plans[-1].splits.train, plans[-1].splits.eval):
        is_unpaired = loss.dataset_type == "unpaired_preference"
        if is_unpaired and len(examples) and not any(example.kl_completion for example in examples):
            raise ValueError(
                f"{type(loss.first_loss).__name__} estimates a KL from completions of other prompts, but all "
                "rows of a split have the same prompt: add rows, or evaluate on none (--eval-fraction 0)."
            )
