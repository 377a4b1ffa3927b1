"""Read and check everything that a run needs, before training starts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from accelerate.utils import set_seed

from dpo_wrapper.batches.token_level import check_wpo
from dpo_wrapper.data import Fields, Message, Unit, encode_as, read_as, split_rows
from dpo_wrapper.losses import WeightedLosses, check_columns, needs_reference, parse_losses, unit_of
from dpo_wrapper.pretrained import PretrainedModel, load_pretrained
from dpo_wrapper.reference.reference import place
from dpo_wrapper.training.config import TrainConfig, flag
from dpo_wrapper.training.run_folder import RunFolder
from dpo_wrapper.training.trainer import Splits
from dpo_wrapper.validation import check_ld_alpha

Rows = Sequence[Any]
"""Examples as text, of one dataset type."""


@dataclass(frozen=True)
class TrainSetup:
    """Everything that a run needs, read and checked before training starts.

    Attributes:
        notes: sentences for the user, such as how many rows were left out.
    """

    config: TrainConfig
    run: RunFolder
    pretrained: PretrainedModel
    splits: Splits
    notes: tuple[str, ...]


def set_up_training(config: TrainConfig) -> TrainSetup:
    """Read and check everything before training starts.

    Raises:
        ValueError, TypeError, OSError, ImportError: one sentence about the setting or the row that is wrong.
    """
    losses = parse_losses(config.loss)
    check_options(config, losses)
    run = RunFolder(config)
    run.check(config.resume)
    train_rows, eval_rows, errors = read_splits(config, losses)

    set_seed(config.seed)
    resumes_after_sft = run.sft_folder.is_dir() and run.progress.stage == "dpo"
    model_name = str(run.sft_folder) if resumes_after_sft else config.model
    pretrained = load_pretrained(model_name, config.tokenizer, config.max_length)

    notes = describe_batchwise_losses(losses)
    examples: dict[str, list[Any]] = {}
    for name, rows in (("train", train_rows), ("eval", eval_rows)):
        encoded = encode_rows(config, losses, rows, pretrained)
        examples[name] = encoded.entries
        errors = [*errors, *encoded.errors]
        if encoded.summary():
            notes.append(f"{name}: {encoded.summary()}")
    if errors:
        notes.append(f"{len(errors)} rows could not be read and are left out; the first: {errors[0]}")
    splits = Splits(**examples, unit=unit_of(losses))
    check_splits(config, losses, splits)
    return TrainSetup(config, run, pretrained, splits, tuple(notes))


def check_options(config: TrainConfig, losses: WeightedLosses) -> None:
    """Raise ValueError for options that have no effect with these losses or without a reference."""
    check_wpo(config.wpo, losses)
    check_ld_alpha(config.ld_alpha, losses)
    reference_options = (
        "precompute_ref_log_probs",
        "ref_model_sync_steps",
        "reference_dtype",
        "reference_device",
    )
    given = [flag(name) for name in reference_options if getattr(config, name)]
    if given and (config.reference == "none" or not needs_reference(losses)):
        why = "--reference is none" if config.reference == "none" else f"--loss {config.loss} needs none"
        raise ValueError(f"{given[0]} needs a reference, but {why}: leave it out.")
    if config.reference_device is not None:
        place(config.reference_device)


def read_splits(config: TrainConfig, losses: WeightedLosses) -> tuple[Rows, Rows, Sequence[Any]]:
    """Train rows, eval rows, and the errors of the rows that were left out."""
    unit = cast(Unit, unit_of(losses))
    fields = Fields(prompt=config.prompt_field, chosen=config.chosen_field, rejected=config.rejected_field)

    def read(path: Any) -> tuple[list[Any], Sequence[Any]]:
        return read_as(unit, path, fields, on_error=config.on_error, ranking=config.ranking)

    rows, errors = read(config.data)
    if config.eval_data is None:
        train_rows, eval_rows = split_rows(rows, config.eval_fraction, config.seed)
        return train_rows, eval_rows, errors
    eval_rows, eval_errors = read(config.eval_data)
    return rows, eval_rows, [*errors, *eval_errors]


def encode_rows(config: TrainConfig, losses: WeightedLosses, rows: Rows, pretrained: PretrainedModel) -> Any:
    """The token ids of rows, each at most `config.max_length` tokens long."""
    return encode_as(
        cast(Unit, unit_of(losses)),
        [as_chat(row) if config.as_chat else row for row in rows],
        pretrained.tokenizer,
        config.max_length,
        on_error=config.on_error,
        seed=config.seed,
    )


def as_chat(row: Any) -> Any:
    """The row with a plain-text prompt as a user turn."""
    return replace(row, prompt=(Message("user", row.prompt),)) if isinstance(row.prompt, str) else row


def describe_batchwise_losses(losses: WeightedLosses) -> list[str]:
    """A note on each loss whose value depends on how a step is split into micro-batches."""
    return [
        f"{type(loss).__name__} compares the pairs of one forward pass with one another: raise "
        "--micro-batch-tokens if a step takes several passes"
        for loss, _ in losses
        if not loss.per_pair
    ]


def check_splits(config: TrainConfig, losses: WeightedLosses, splits: Splits) -> None:
    """Raise ValueError if the examples are not what the losses and the supervised training need."""
    examples = (*splits.train, *splits.eval)
    check_columns(
        losses,
        margins=any(getattr(example, "margin", None) is not None for example in examples),
        pair_weights=any(example.weight is not None for example in examples),
    )
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
    if splits.unit == "rows":
        check_kl_completions(losses, splits)


def check_kl_completions(losses: WeightedLosses, splits: Splits) -> None:
    parts: tuple[Sequence[Any], ...] = (splits.train, splits.eval)
    for examples in parts:
        if examples and not any(example.mismatched for example in examples):
            raise ValueError(
                f"{type(losses[0][0]).__name__} estimates a KL from completions of other prompts, but all "
                "rows of a split have the same prompt: add rows, or evaluate on none (--eval-fraction 0)."
            )


def select_sft_examples(splits: Splits) -> Splits:
    """The examples of supervised training: of rows with a label those that are desirable."""
    train, eval = ([example for example in part if example.wanted] for part in (splits.train, splits.eval))
    return Splits(train, eval, splits.unit)
