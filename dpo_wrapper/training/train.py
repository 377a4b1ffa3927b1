"""From a file of preferences to a better model: `train(TrainConfig(data = ...))`."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from tqdm import tqdm

from dpo_wrapper.batches.token_level import check_wpo
from dpo_wrapper.data import (
    DatasetType,
    Example,
    ExampleError,
    Fields,
    Message,
    TokenizedExample,
    add_kl_completions,
    check_ranking,
    convert_examples,
    read_examples,
    split_examples,
    tokenize_examples,
)
from dpo_wrapper.data.errors import OnError
from dpo_wrapper.dpo import DPO
from dpo_wrapper.evaluation.evaluate import complete
from dpo_wrapper.evaluation.report import plot_curves, summary_table
from dpo_wrapper.losses import WeightedLosses, check_columns, needs_reference, parse_losses, unit_of
from dpo_wrapper.pretrained import Policy, load_policy, save_policy
from dpo_wrapper.reference.cache import CachedReference
from dpo_wrapper.reference.precompute import cache_reference
from dpo_wrapper.reference.reference import place
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.run_folder import RunFolder
from dpo_wrapper.training.stages import DATASET_TYPES, DPOStage, SFTStage
from dpo_wrapper.training.trainer import Loop, Parts
from dpo_wrapper.validation import check_ld_alpha

COMPLETION_TOKENS = 120


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs, checked: nothing a user can get wrong is left to find out later."""

    config: TrainConfig
    run: RunFolder
    policy: Policy
    data: Parts
    notes: tuple[str, ...]


def check_reference(config: TrainConfig, losses: WeightedLosses) -> None:
    """Refuse what is said of a reference where there is none."""
    options = ("precompute_reference", "sync_every", "reference_dtype", "reference_device")
    asked = [f"--{name.replace('_', '-')}" for name in options if getattr(config, name)]
    if asked and (config.reference == "none" or not needs_reference(losses)):
        why = "--reference is none" if config.reference == "none" else f"--loss {config.loss} needs none"
        raise ValueError(f"{asked[0]} is about a reference, but {why}: leave it out.")
    if config.reference_device is not None:
        place(config.reference_device)


def as_chat(example: Example) -> Example:
    """The example with a plain prompt as one user turn."""
    prompt = example.prompt
    return replace(example, prompt=(Message("user", prompt),)) if isinstance(prompt, str) else example


def read_data(
    path: Path, config: TrainConfig, dataset_type: DatasetType
) -> tuple[list[Example], list[ExampleError]]:
    """Read the examples of a file, converted to what the loss needs, and the errors of those left out."""
    fields = Fields(prompt=config.prompt_field, chosen=config.chosen_field, rejected=config.rejected_field)
    on_error: OnError = "skip" if config.skip_bad_rows else "raise"
    examples, errors = read_examples(path, fields, on_error=on_error)
    if path == config.data:
        check_ranking(config.ranking, dataset_type, examples)
    ranking = config.ranking or "all"
    converted, conversion_errors = convert_examples(examples, dataset_type, ranking, on_error=on_error)
    return converted, errors + conversion_errors


def prepare(config: TrainConfig) -> Prepared:
    """Read and check everything before a model is trained.

    Raises:
        ValueError, TypeError, OSError, ImportError: one sentence about what does not fit.
    """
    losses = parse_losses(config.loss)
    check_wpo(config.wpo, losses)
    check_ld_alpha(config.ld_alpha, losses)
    unit = unit_of(losses)
    dataset_type = DATASET_TYPES[unit]
    check_reference(config, losses)
    run = RunFolder(config)
    run.check(config.resume)
    examples, errors = read_data(config.data, config, dataset_type)
    if config.eval_data is None:
        parts = split_examples(examples, config.eval_fraction, config.seed)
    else:
        eval_examples, eval_errors = read_data(config.eval_data, config, dataset_type)
        parts, errors = (examples, eval_examples), [*errors, *eval_errors]

    set_seed(config.seed)
    start = str(run.sft) if run.sft.is_dir() and run.progress.stage == "dpo" else config.model
    policy = load_policy(start, config.tokenizer, config.max_length)
    notes = [
        f"{type(loss).__name__} compares the pairs of one forward pass with one another: raise --max-tokens "
        "if a step takes several"
        for loss, _ in losses
        if not loss.per_pair
    ]
    entries: list[list[TokenizedExample]] = []
    for name, part in zip(("training", "held-out"), parts, strict=True):
        part = [as_chat(example) for example in part] if config.as_chat else part
        on_error: OnError = "skip" if config.skip_bad_rows else "raise"
        tokenized = tokenize_examples(part, policy.tokenizer, config.max_length, on_error=on_error)
        errors = [*errors, *tokenized.errors]
        entries.append(add_kl_completions(tokenized.examples, config.max_length, config.seed))
        if tokenized.summary():
            notes.append(f"{name}: {tokenized.summary()}")
    if errors:
        notes.append(f"{len(errors)} rows could not be read and are left out; the first: {errors[0]}")
    both = [entry for part in entries for entry in part]
    check_columns(
        losses,
        margins=any(entry.margin is not None for entry in both),
        pair_weights=any(entry.weight is not None for entry in both),
    )
    if not entries[0]:
        raise ValueError(f"{config.data} leaves no {unit} to train on.")
    if config.warm_up_epochs and not any(entry.sft_completion for entry in entries[0]):
        raise ValueError(
            "no row to train on is wanted, so there is nothing to warm up on: give --sft-epochs 0."
        )
    if unit == "rows" and not all(any(entry.kl_completion for entry in part) for part in entries if part):
        raise ValueError(
            f"{type(losses[0][0]).__name__} estimates a KL from completions of other prompts, but all "
            "rows of a part have the same one: add rows, or hold none out (--eval-fraction 0)."
        )
    return Prepared(config, run, policy, Parts(entries[0], entries[1], unit), tuple(notes))


def train(config: TrainConfig) -> RunFolder:
    """Run the whole of `dpo-wrapper train`; the run folder holds the result."""
    return run_prepared(prepare(config))


def run_prepared(prepared: Prepared) -> RunFolder:
    config, run, policy = prepared.config, prepared.run, prepared.policy
    data, loop = prepared.data, Loop(config, run)
    accelerator = loop.accelerator()
    say = accelerator.print
    if accelerator.is_main_process:
        run.open()

    model = policy.model
    sizes = f"{len(data.training)} training and {len(data.held_out)} held-out {data.unit}"
    say(f"{describe_size(model)}, {sizes}")
    for note in prepared.notes:
        say(note)
    if config.warm_up_epochs and run.progress.stage == "sft":
        loop.stage(
            SFTStage(model),
            written(data),
            config.warm_up_epochs,
            config.sft_lr or (2e-3 if config.fresh else 1e-5),
        )
        if accelerator.is_main_process:
            save_policy(policy, model, run.sft, run.settings)
            run.pass_to("dpo")

    asked = config.sync_every or config.reference_dtype or config.reference_device
    reference: str | CachedReference = "copy" if asked else config.reference
    if config.precompute_reference:
        reference = precomputed(config, run, model, data, accelerator)
    dpo = DPO(
        model,
        loss=parse_losses(config.loss),
        reference=reference,
        reference_dtype=getattr(torch, config.reference_dtype) if config.reference_dtype else None,
        reference_device=config.reference_device,
        remember_reference=not config.sync_every,
        ld_alpha=config.ld_alpha,
        wpo=config.wpo,
    )
    stage = DPOStage(dpo, sync_every=config.sync_every, sync_alpha=config.sync_alpha)
    loop.stage(stage, data, config.epochs, config.lr or (1e-4 if config.fresh else 1e-6))
    if accelerator.is_main_process:
        save_policy(policy, dpo.policy_model, run.path, run.settings)
        run.drop_checkpoint()
        plot_curves(run.records(), run.curves)
        say("\n" + before_and_after(run))
        shown_one = next((entry for entry in (*data.held_out, *data.training) if entry.sft_completion), None)
        if shown_one is not None:
            say("\n" + side_by_side(policy, dpo, shown_one))
        say(f"\nThe policy, its metrics and curves.png are in {run.path}")
    accelerator.wait_for_everyone()
    return run


def written(data: Parts) -> Parts:
    """What the warm-up learns to write: of rows with a label those that are wanted."""
    training, held_out = (
        [entry for entry in part if entry.sft_completion] for part in (data.training, data.held_out)
    )
    return Parts(training, held_out, data.unit)


def precomputed(
    config: TrainConfig, run: RunFolder, model: nn.Module, data: Parts, accelerator: Accelerator
) -> CachedReference:
    """What the model as it is now says of all the data, from the run folder or else computed into it."""
    model.to(accelerator.device)
    of_tokens = config.ld_alpha < 1
    cached = CachedReference(per_token=of_tokens)
    for name, entries in (("training", data.training), ("held-out", data.held_out)):
        bar = tqdm(
            total=len(entries),
            desc=f"reference, {name}",
            unit=data.unit.removesuffix("s"),
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
            disable=not accelerator.is_main_process,
        )
        with bar, accelerator.autocast():
            cached |= cache_reference(
                entries,
                model,
                run.reference / name,
                token_scores=of_tokens,
                max_tokens=config.max_tokens,
                progress=bar.update,
            )
    return cached


def describe_size(model: nn.Module) -> str:
    count = sum(p.numel() for p in model.parameters())
    return f"{type(model).__name__} with {count / 1e6:.1f}M parameters"


def before_and_after(run: RunFolder) -> str:
    """Held-out and training metrics at both ends of preference training, as a table."""
    columns = []
    for part in ("held-out", "training"):
        ends = [record for record in run.records() if record["stage"] == "dpo" and record["part"] == part]
        if ends:
            columns += [(f"{part} before", ends[0]), ("after", ends[-1])]
    return summary_table(columns)


def side_by_side(policy: Policy, dpo: DPO, entry: TokenizedExample) -> str:
    """One prompt with what the reference and the policy make of it, each at its most likely."""
    tokenizer = policy.tokenizer
    lines = [f"prompt     {shown(tokenizer.decode(list(entry.prompt)), end=True)}"]
    for name, model in (("reference", dpo.ref_model), ("policy", dpo.policy_model)):
        if model is not None:
            ids = complete(model, list(entry.prompt), COMPLETION_TOKENS, tokenizer.eos_id)
            lines.append(f"{name.ljust(9)}  {shown(tokenizer.decode(ids))}")
    lines.append(f"chosen     {shown(tokenizer.decode(list(entry.sft_completion or ())))}")
    return "\n".join(lines)


def shown(text: str, most: int = 300, *, end: bool = False) -> str:
    """Text on one line; of a long one its beginning, or its end."""
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    return f"…{line[-most:]}" if end else f"{line[:most]}…"
