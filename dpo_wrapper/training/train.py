"""Train a model on a file of preferences: `train(TrainConfig(data = ...))`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from tqdm import tqdm

from dpo_wrapper.data import (
    Example,
    ExampleError,
    Fields,
    Message,
    TokenizedExamples,
    add_kl_completions,
    check_ranking,
    convert_examples,
    read_examples,
    scored_sequences,
    split_examples,
    tokenize_examples,
)
from dpo_wrapper.dpo import DPO
from dpo_wrapper.evaluation.report import format_before_and_after, format_completions, plot_curves
from dpo_wrapper.losses import CombinedLoss, parse_losses
from dpo_wrapper.pretrained import PretrainedModel, load_pretrained, save_pretrained
from dpo_wrapper.reference import CachedReference, precompute_ref_log_probs
from dpo_wrapper.reference.build import parse_device
from dpo_wrapper.training.config import TrainConfig, flag
from dpo_wrapper.training.run_folder import RunFolder
from dpo_wrapper.training.stages import DPOStage, SFTStage
from dpo_wrapper.training.trainer import Splits, Trainer, create_accelerator, progress_interval

UNITS = {"preference": "pairs", "ranked": "lists", "unpaired_preference": "rows"}
"""What examples of each dataset type are called in what is printed and logged."""


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


def train(config: TrainConfig) -> RunFolder:
    """Train a model as `dpo-wrapper train` does; the run folder holds the result.

    Raises:
        ValueError, TypeError, OSError, ImportError: as in `set_up_training`.
    """
    return run_training(set_up_training(config))


# set-up


def set_up_training(config: TrainConfig) -> TrainSetup:
    """Read and check everything before training starts.

    Raises:
        ValueError, TypeError, OSError, ImportError: one sentence about the setting or the row that is wrong.
    """
    loss = CombinedLoss(parse_losses(config.loss))
    check_options(config, loss)
    run = RunFolder(config)
    run.check(config.resume)
    train_texts, eval_texts, errors = read_splits(config, loss)

    set_seed(config.seed)
    resumes_after_sft = run.sft_folder.is_dir() and run.progress.stage == "dpo"
    model_name = str(run.sft_folder) if resumes_after_sft else config.model
    pretrained = load_pretrained(model_name, config.tokenizer, config.max_length)

    notes = describe_batchwise_losses(loss)
    examples: dict[str, list[Any]] = {}
    for name, texts in (("train", train_texts), ("eval", eval_texts)):
        tokenized = tokenize(config, texts, pretrained)
        examples[name] = add_kl_completions(tokenized.examples, config.max_length, config.seed)
        errors = [*errors, *tokenized.errors]
        if tokenized.summary():
            notes.append(f"{name}: {tokenized.summary()}")
    if errors:
        notes.append(f"{len(errors)} rows could not be read and are left out; the first: {errors[0]}")
    splits = Splits(**examples, unit=UNITS[loss.dataset_type])
    check_splits(config, loss, splits)
    return TrainSetup(config, run, pretrained, splits, tuple(notes))


def check_options(config: TrainConfig, loss: CombinedLoss) -> None:
    """Raise ValueError for options that have no effect with these losses or without a reference."""
    loss.check_wpo(config.wpo)
    loss.check_ld_alpha(config.ld_alpha)
    reference_options = (
        "precompute_ref_log_probs",
        "ref_model_sync_steps",
        "reference_dtype",
        "reference_device",
    )
    given = [flag(name) for name in reference_options if getattr(config, name)]
    if given and (config.reference == "none" or not loss.needs_reference):
        why = "--reference is none" if config.reference == "none" else f"--loss {config.loss} needs none"
        raise ValueError(f"{given[0]} needs a reference, but {why}: leave it out.")
    if config.reference_device is not None:
        parse_device(config.reference_device)


def read_splits(
    config: TrainConfig, loss: CombinedLoss
) -> tuple[list[Example], list[Example], list[ExampleError]]:
    """Train and eval examples as the losses need them, and the errors of the rows that were left out."""
    examples, errors = read_data(config.data, config, loss.dataset_type)
    if config.eval_data is None:
        train_examples, eval_examples = split_examples(examples, config.eval_fraction, config.seed)
        return train_examples, eval_examples, errors
    eval_examples, eval_errors = read_data(config.eval_data, config, loss.dataset_type)
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


def tokenize(config: TrainConfig, examples: list[Example], pretrained: PretrainedModel) -> TokenizedExamples:
    """The examples as token ids, each sequence at most `config.max_length` tokens long."""
    if config.as_chat:
        examples = [as_chat(example) for example in examples]
    return tokenize_examples(examples, pretrained.tokenizer, config.max_length, on_error=config.on_error)


def as_chat(example: Example) -> Example:
    """The example with a plain-text prompt as a user turn."""
    if not isinstance(example.prompt, str):
        return example
    return replace(example, prompt=(Message("user", example.prompt),))


def describe_batchwise_losses(loss: CombinedLoss) -> list[str]:
    return [
        f"{type(term).__name__} compares the pairs of one forward pass with one another: raise "
        "--micro-batch-tokens if a step takes several passes"
        for term, _ in loss.terms
        if not term.is_per_pair
    ]


def check_splits(config: TrainConfig, loss: CombinedLoss, splits: Splits) -> None:
    """Raise ValueError if the examples are not what the losses and the supervised training need."""
    examples = (*splits.train, *splits.eval)
    has_margins = any(example.margin is not None for example in examples)
    loss.check_columns(has_margins, has_weights=any(example.weight is not None for example in examples))
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
        check_kl_completions(loss, splits)


def check_kl_completions(loss: CombinedLoss, splits: Splits) -> None:
    for examples in (splits.train, splits.eval):
        if examples and not any(example.kl_completion for example in examples):
            raise ValueError(
                f"{type(loss.first).__name__} estimates a KL from completions of other prompts, but all "
                "rows of a split have the same prompt: add rows, or evaluate on none (--eval-fraction 0)."
            )


def select_sft_examples(splits: Splits) -> Splits:
    """The examples of supervised training: of rows with a label those that are desirable."""
    train, eval = (
        [example for example in part if example.sft_completion] for part in (splits.train, splits.eval)
    )
    return Splits(train, eval, splits.unit)


# run


def run_training(setup: TrainSetup) -> RunFolder:
    """Run supervised training (if there are epochs of it) and preference training; report the result."""
    config, run, splits, model = setup.config, setup.run, setup.splits, setup.pretrained.model
    accelerator = create_accelerator(config)
    if accelerator.is_main_process:
        run.open()
    sizes = f"{len(splits.train)} train and {len(splits.eval)} eval {splits.unit}"
    accelerator.print(f"{describe_model(model)}, {sizes}")
    for note in setup.notes:
        accelerator.print(note)

    if config.num_sft_epochs and run.progress.stage == "sft":
        train_sft(setup, accelerator)
    dpo = build_dpo(setup, accelerator)
    stage = DPOStage(dpo, sync_steps=config.ref_model_sync_steps, mixup_alpha=config.ref_model_mixup_alpha)
    epochs, learning_rate = config.epochs, config.peak_learning_rate
    Trainer(config, run, stage, splits, epochs=epochs, learning_rate=learning_rate).train()
    if accelerator.is_main_process:
        save_pretrained(setup.pretrained, dpo.policy_model, run.path, run.settings)
        run.delete_checkpoint()
        report_results(setup, dpo)
    accelerator.wait_for_everyone()
    return run


def train_sft(setup: TrainSetup, accelerator: Accelerator) -> None:
    """Supervised training on prompt and chosen completion; the model is saved in the run folder."""
    config, run, model = setup.config, setup.run, setup.pretrained.model
    Trainer(
        config,
        run,
        SFTStage(model),
        select_sft_examples(setup.splits),
        epochs=config.num_sft_epochs,
        learning_rate=config.peak_sft_learning_rate,
    ).train()
    if accelerator.is_main_process:
        save_pretrained(setup.pretrained, model, run.sft_folder, run.settings)
        run.start_stage("dpo")


def build_dpo(setup: TrainSetup, accelerator: Accelerator) -> DPO:
    """The policy with its reference, which is the model as it is now."""
    config, model = setup.config, setup.pretrained.model
    needs_copy = config.ref_model_sync_steps or config.reference_dtype or config.reference_device
    reference: str | CachedReference = "copy" if needs_copy else config.reference
    if config.precompute_ref_log_probs:
        reference = precompute_reference(setup, accelerator)
    return DPO(
        model,
        loss=parse_losses(config.loss),
        reference=reference,
        reference_dtype=getattr(torch, config.reference_dtype) if config.reference_dtype else None,
        reference_device=config.reference_device,
        cache_ref_log_probs=not config.ref_model_sync_steps,
        ld_alpha=config.ld_alpha,
        wpo=config.wpo,
    )


def precompute_reference(setup: TrainSetup, accelerator: Accelerator) -> CachedReference:
    """The log-probs of all examples under the model as it is now, kept in the run folder."""
    config, splits, model = setup.config, setup.splits, setup.pretrained.model
    model.to(accelerator.device)
    per_token = config.ld_alpha < 1
    cached = CachedReference(per_token=per_token)
    for name, examples in (("train", splits.train), ("eval", splits.eval)):
        sequences = scored_sequences(examples, config.micro_batch_tokens)
        bar = tqdm(
            total=sum(len(batch.length) for batch in sequences),
            desc=f"reference, {name}",
            unit="sequence",
            mininterval=progress_interval(),
            disable=not accelerator.is_main_process,
        )
        with bar, accelerator.autocast():
            folder = setup.run.reference_folder / name
            cached |= precompute_ref_log_probs(
                sequences, model, folder, per_token=per_token, progress=bar.update
            )
    return cached


def report_results(setup: TrainSetup, dpo: DPO) -> None:
    """Plot the curves; print metrics before and after training, and completions of one prompt."""
    run, splits = setup.run, setup.splits
    records = run.read_records()
    plot_curves(records, run.curves_file)
    print("\n" + format_before_and_after(records))
    example = next((example for example in (*splits.eval, *splits.train) if example.sft_completion), None)
    if example is not None:
        models = {"reference": dpo.ref_model, "policy": dpo.policy_model}
        print("\n" + format_completions(setup.pretrained.tokenizer, models, example))
    print(f"\nThe policy, its metrics and curves.png are in {run.path}")


def describe_model(model: nn.Module) -> str:
    num_parameters = sum(p.numel() for p in model.parameters())
    return f"{type(model).__name__} with {num_parameters / 1e6:.1f}M parameters"
