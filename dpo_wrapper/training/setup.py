"""Read and check everything that a run needs, before training starts."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from dpo_wrapper.data import (
    Example,
    ExampleError,
    Fields,
    Message,
    check_ranking,
    convert_examples,
    count_shared_prompts,
    read_examples,
    split_examples,
    tokenize_examples,
)
from dpo_wrapper.data.collate import add_kl_completions
from dpo_wrapper.losses import CombinedLoss, parse_losses
from dpo_wrapper.pretrained import PretrainedModel, load_pretrained
from dpo_wrapper.reference.build import parse_device
from dpo_wrapper.training.config import TrainConfig, flag
from dpo_wrapper.training.run_folder import RunFolder
from dpo_wrapper.training.trainer import Splits

UNITS = {"preference": "pairs", "ranked": "lists", "unpaired_preference": "rows"}
"""What examples of each dataset type are called in what is printed and logged."""


@dataclass(frozen=True)
class TrainSetup:
    """What a run needs, and notes that are printed when it starts, such as how many rows were left out."""

    config: TrainConfig
    run: RunFolder
    pretrained: PretrainedModel
    splits: Splits
    notes: list[str]


def set_up_training(config: TrainConfig) -> TrainSetup:
    """Read and check everything before training starts.

    Raises:
        ValueError, TypeError, OSError, ImportError: one sentence about the setting or the row that is wrong.
    """
    loss = CombinedLoss(parse_losses(config.loss))
    check_options(config, loss)
    run = RunFolder(config)
    run.check(config.resume)
    train_texts, eval_texts, errors = read_splits(config, loss.dataset_type)

    set_seed(config.seed)
    resumes_after_sft = run.sft_folder.is_dir() and run.progress.stage == "dpo"
    model_name = str(run.sft_folder) if resumes_after_sft else config.model
    pretrained = load_pretrained(model_name, config.tokenizer, config.max_length)

    notes = [
        f"{type(term).__name__} compares the pairs of one forward pass with one another: raise "
        "--micro-batch-tokens if a step takes several passes"
        for term, _ in loss.terms
        if not term.is_per_pair
    ]
    if shared := count_shared_prompts(train_texts, eval_texts):
        notes.append(
            f"{shared} of the {len(eval_texts)} eval examples have prompts that are trained on: their "
            "metrics do not say how the policy does on new prompts."
        )
    examples: dict[str, list[Any]] = {}
    for name, texts in (("train", train_texts), ("eval", eval_texts)):
        if config.as_chat:
            texts = [as_user_turn(example) for example in texts]
        tokenized = tokenize_examples(
            texts, pretrained.tokenizer, config.max_length, on_error=config.on_error
        )
        examples[name] = add_kl_completions(tokenized.examples, config.max_length, config.seed)
        errors = [*errors, *tokenized.errors]
        if tokenized.summary():
            notes.append(f"{name}: {tokenized.summary()}")
    if errors:
        notes.append(f"{len(errors)} rows could not be read and are left out; the first: {errors[0]}")
    splits = Splits(**examples, unit=UNITS[loss.dataset_type])
    check_splits(config, loss, splits)
    return TrainSetup(config, run, pretrained, splits, notes)


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


def read_splits(
    config: TrainConfig, dataset_type: Any
) -> tuple[list[Example], list[Example], list[ExampleError]]:
    """Train and eval examples as the losses need them, and the errors of the rows that were left out."""
    examples, errors = read_data(config.data, config, dataset_type)
    if config.eval_data is None:
        return *split_examples(examples, config.eval_fraction, config.seed), errors
    eval_examples, eval_errors = read_data(config.eval_data, config, dataset_type)
    return examples, eval_examples, [*errors, *eval_errors]


def read_data(path: Path, config: TrainConfig, dataset_type: Any) -> tuple[list[Example], list[ExampleError]]:
    """The examples of a file, converted to what the losses need, and the errors of the rows left out."""
    fields = Fields(prompt=config.prompt_field, chosen=config.chosen_field, rejected=config.rejected_field)
    examples, errors = read_examples(path, fields, on_error=config.on_error)
    if path == config.data:
        check_ranking(config.ranking, dataset_type, examples)
    converted, conversion_errors = convert_examples(
        examples, dataset_type, config.ranking or "all", on_error=config.on_error
    )
    return converted, errors + conversion_errors


def as_user_turn(example: Example) -> Example:
    """The example with a plain-text prompt as a user turn."""
    if not isinstance(example.prompt, str):
        return example
    return replace(example, prompt=(Message("user", example.prompt),))


def check_splits(config: TrainConfig, loss: CombinedLoss, splits: Splits) -> None:
    """Raise ValueError if the examples are not what the losses and the supervised training need."""
    examples = (*splits.train, *splits.eval)
    has_margins = any(example.margin is not None for example in examples)
    has_weights = any(example.weight is not None for example in examples)
    loss.check_columns(has_margins, has_weights)
    if not splits.train:
        raise ValueError(
            f"--data should hold {splits.unit} to train on, but {config.data} leaves none: add rows, or "
            "lower --eval-fraction."
        )
    if config.num_sft_epochs and not select_sft_examples(splits).train:
        raise ValueError(
            "supervised training needs rows with a desirable completion, but there is none to train on: give "
            "--sft-epochs 0."
        )
    for part in (splits.train, splits.eval):
        if splits.unit == "rows" and part and not any(example.kl_completion for example in part):
            raise ValueError(
                f"{type(loss.first_loss).__name__} estimates a KL from completions of other prompts, but all "
                "rows of a split have the same prompt: add rows, or evaluate on none (--eval-fraction 0)."
            )


def select_sft_examples(splits: Splits) -> Splits:
    """The examples of supervised training: of rows with a label those that are desirable."""
    train = [example for example in splits.train if example.sft_completion]
    eval = [example for example in splits.eval if example.sft_completion]
    return Splits(train, eval, splits.unit)
