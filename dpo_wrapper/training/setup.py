"""Read and check everything that a run needs, before training starts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from dpo_wrapper.data import (
    Example,
    check_ranking,
    convert_examples,
    count_shared_prompts,
    read_examples,
    split_examples,
    tokenize_examples,
)
from dpo_wrapper.data.collate import add_kl_completions, as_document
from dpo_wrapper.data.examples import DatasetType
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
    train_texts, eval_texts, notes = read_splits(config, loss.dataset_type)

    set_seed(config.seed)
    resumes_after_sft = run.sft_folder.is_dir() and run.progress.stage == "dpo"
    model_name = str(run.sft_folder) if resumes_after_sft else config.model
    pretrained = load_pretrained(
        model_name, config.tokenizer, config.max_length, config.tokenizer_options(run.today)
    )

    notes += [
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
    summaries: dict[str, str] = {}
    for name, texts in (("train", train_texts), ("eval", eval_texts)):
        tokenized = tokenize_examples(
            texts,
            pretrained.tokenizer,
            on_error=config.on_error,
            **config.tokenize_options,
        )
        examples[name] = add_kl_completions(tokenized.examples, config.max_length, config.seed)
        if tokenized.errors:
            problem = f"{name}: {len(tokenized.errors):,} rows could not be tokenized and are left out"
            notes.append(f"{problem}; the first: {tokenized.errors[0]}")
        summaries[name] = tokenized.summary()
        if tokenized.summary():
            notes.append(f"{name}: {tokenized.summary()}")
    splits = Splits(**examples, unit=UNITS[loss.dataset_type])
    check_splits(config, loss, splits, summaries["train"])
    check_model(pretrained, splits)
    return TrainSetup(config, run, pretrained, splits, notes)


def check_options(config: TrainConfig, loss: CombinedLoss) -> None:
    """Raise ValueError for options that have no effect with these losses or without a reference."""
    if config.kind not in (None, loss.dataset_type):
        problem = f"--kind should be what --loss learns from, {loss.dataset_type}, but it is {config.kind}"
        raise ValueError(f"{problem}: leave it out, or take another loss.")
    loss.check_wpo(config.wpo)
    loss.check_ld_alpha(config.ld_alpha)
    names = ("precompute_ref_log_probs", "ref_model_sync_steps", "reference_dtype", "reference_device")
    flags = [flag(name) for name in names if getattr(config, name)]
    if flags and (config.reference == "none" or not loss.needs_reference):
        why = "--reference is none" if config.reference == "none" else f"--loss {config.loss} needs none"
        raise ValueError(f"{flags[0]} needs a reference, but {why}: leave it out.")
    if config.reference_device is not None:
        parse_device(config.reference_device)


def read_splits(config: TrainConfig, dataset_type: Any) -> tuple[list[Example], list[Example], list[str]]:
    """Train and eval examples as the losses need them, and sentences on what was left out or not used."""
    examples, notes = read_data(config.data, config, dataset_type)
    if config.eval_data is None:
        return *split_examples(examples, config.eval_fraction, config.seed), notes
    eval_examples, eval_notes = read_data(config.eval_data, config, dataset_type)
    held_out = [example for example in examples if example.split == "test"]
    if held_out:
        examples = [example for example in examples if example.split != "test"]
        notes.append(f"{len(held_out):,} rows of --data that are marked as test are left out.")
    return examples, eval_examples, [*notes, *(f"eval: {note}" for note in eval_notes)]


def read_data(
    paths: Sequence[Path], config: TrainConfig, dataset_type: DatasetType
) -> tuple[list[Example], list[str]]:
    """The examples of files, converted to what the losses need, and sentences on the others."""
    read = read_examples(paths, config.fields, split=config.split, on_error=config.on_error)
    if paths == config.data:
        check_ranking(config.ranking, dataset_type, read.examples)
    converted, errors = convert_examples(
        read.examples, dataset_type, config.ranking or "all", on_error=config.on_error
    )
    return converted, replace(read, errors=[*read.errors, *errors]).notes()


def check_splits(config: TrainConfig, loss: CombinedLoss, splits: Splits, summary: str = "") -> None:
    """Raise ValueError if the examples are not what the losses and the supervised training need."""
    examples = (*splits.train, *splits.eval)
    has_margins = any(example.margin is not None for example in examples)
    has_weights = any(example.weight is not None for example in examples)
    loss.check_columns(has_margins, has_weights)
    if not splits.train:
        names = ", ".join(map(str, config.data))
        reason = f" ({summary.removesuffix('.')})" if summary else ""
        raise ValueError(
            f"--data should hold {splits.unit} to train on, but {names} leaves none{reason}: add "
            "rows, or lower --eval-fraction."
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


def check_model(pretrained: PretrainedModel, splits: Splits) -> None:
    """Raise ValueError if an example has a token or a position that the model does not know."""
    num_ids, max_positions = pretrained.num_embeddings, pretrained.max_positions
    for example in (*splits.train, *splits.eval):
        largest = max((max(ids) for ids in (example.prompt, *example.completions) if ids), default=0)
        if largest >= num_ids:
            raise ValueError(
                f"{example.source}: token ids should be below {num_ids}, the size of the model's vocabulary, "
                f"but one is {largest}: use the model's own tokenizer, not {pretrained.tokenizer_name}."
            )
        longest = len(example.prompt) + max(map(len, example.completions)) - 1  # the last token is no input
        if max_positions is not None and longest > max_positions:
            raise ValueError(
                f"--max-length should be at most {max_positions + 1}, for the positions of the model end "
                f"at {max_positions}, but {example.source} has {longest + 1} tokens: lower it."
            )


def select_sft_examples(splits: Splits) -> Splits:
    """The documents of supervised training: of rows with a label those that are desirable."""
    train = [as_document(example) for example in splits.train if example.sft_completion]
    eval = [as_document(example) for example in splits.eval if example.sft_completion]
    return Splits(train, eval, splits.unit)
