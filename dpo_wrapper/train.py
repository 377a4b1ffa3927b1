"""From a file of preferences to a better model: `train(TrainConfig(data = ...))`."""

import sys
from dataclasses import dataclass, replace
from typing import Literal

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from tqdm import tqdm

from dpo_wrapper.cached import cache_reference
from dpo_wrapper.config import TrainConfig
from dpo_wrapper.data import (
    Fields,
    Message,
    PreferenceCollator,
    PreferenceDataset,
    Row,
    TokenPair,
    encode_rows,
    read_rows,
    split_rows,
)
from dpo_wrapper.dpo import DPO
from dpo_wrapper.evaluate import complete
from dpo_wrapper.loop import Loop
from dpo_wrapper.losses import check_columns, needs_reference, parse_losses
from dpo_wrapper.policies import Policy, load_policy, save_policy
from dpo_wrapper.recall import CachedReference
from dpo_wrapper.report import plot_curves, summary_table
from dpo_wrapper.runs import RunFolder
from dpo_wrapper.stages import DPOStage, SFTStage
from dpo_wrapper.token_level import check_wpo

COMPLETION_TOKENS = 120


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs, checked: nothing a user can get wrong is left to find out later."""

    config: TrainConfig
    run: RunFolder
    policy: Policy
    training: list[TokenPair]
    held_out: list[TokenPair]
    notes: tuple[str, ...]


def as_chat(row: Row) -> Row:
    """A plain prompt as one user turn."""
    return replace(row, prompt=(Message("user", row.prompt),)) if isinstance(row.prompt, str) else row


def prepare(config: TrainConfig) -> Prepared:
    """Read and check everything before a model is trained.

    Raises:
        ValueError, TypeError, OSError, ImportError: one sentence about what does not fit.
    """
    losses = parse_losses(config.loss)
    check_wpo(config.wpo, losses)
    option = "--precompute-reference" if config.precompute_reference else "--sync-every"
    asked = config.precompute_reference or config.sync_every
    if asked and (config.reference == "none" or not needs_reference(losses)):
        why = "--reference is none" if config.reference == "none" else f"--loss {config.loss} needs none"
        raise ValueError(f"{option} is about a reference, but {why}: leave it out.")
    run = RunFolder(config)
    run.check(config.resume)
    fields = Fields(prompt=config.prompt_field, chosen=config.chosen_field, rejected=config.rejected_field)
    on_error: Literal["raise", "skip"] = "skip" if config.skip_bad_rows else "raise"
    rows, errors = read_rows(config.data, fields, on_error=on_error)
    if config.eval_data is None:
        parts = split_rows(rows, config.eval_fraction, config.seed)
    else:
        held_out, more = read_rows(config.eval_data, fields, on_error=on_error)
        parts, errors = (rows, held_out), [*errors, *more]

    set_seed(config.seed)
    start = str(run.sft) if run.sft.is_dir() and run.progress.stage == "dpo" else config.model
    policy = load_policy(start, config.tokenizer, config.max_length)
    notes = [
        f"{type(loss).__name__} compares the pairs of one forward pass with one another: raise --max-tokens "
        "if a step takes several"
        for loss, _ in losses
        if not loss.per_pair
    ]
    pairs: list[list[TokenPair]] = []
    for name, part in zip(("training", "held-out"), parts, strict=True):
        encoded = encode_rows(
            [as_chat(row) if config.as_chat else row for row in part],
            policy.tokenizer,
            config.max_length,
            on_error=on_error,
        )
        errors = [*errors, *encoded.errors]
        pairs.append(list(encoded.pairs))
        if encoded.summary():
            notes.append(f"{name}: {encoded.summary()}")
    if errors:
        notes.append(f"{len(errors)} rows could not be read and are left out; the first: {errors[0]}")
    both = [pair for part in pairs for pair in part]
    check_columns(
        losses,
        margins=any(pair.margin is not None for pair in both),
        pair_weights=any(pair.weight is not None for pair in both),
    )
    if not pairs[0]:
        raise ValueError(f"{config.data} leaves no pair to train on.")
    return Prepared(config, run, policy, pairs[0], pairs[1], tuple(notes))


def train(config: TrainConfig) -> RunFolder:
    """Run the whole of `dpo-wrapper train`; the run folder holds the result."""
    return run_prepared(prepare(config))


def run_prepared(prepared: Prepared) -> RunFolder:
    config, run, policy = prepared.config, prepared.run, prepared.policy
    pad_id = policy.tokenizer.pad_id
    training, held_out = (
        PreferenceDataset(pairs, pad_id) for pairs in (prepared.training, prepared.held_out)
    )
    collate = PreferenceCollator(pad_id)
    loop = Loop(config, run, training, held_out)
    accelerator = loop.accelerator()
    say = accelerator.print
    if accelerator.is_main_process:
        run.open()

    model = policy.model
    say(f"{describe_size(model)}, {len(training)} training and {len(held_out)} held-out pairs")
    for note in prepared.notes:
        say(note)
    sft_epochs = config.sft_epochs if config.sft_epochs is not None else 10 if config.fresh else 0
    if sft_epochs and run.progress.stage == "sft":
        loop.stage(SFTStage(model, collate), sft_epochs, config.sft_lr or (2e-3 if config.fresh else 1e-5))
        if accelerator.is_main_process:
            save_policy(policy, model, run.sft, run.settings)
            run.pass_to("dpo")

    reference: str | CachedReference = "copy" if config.sync_every else config.reference
    if config.precompute_reference:
        reference = precomputed(config, run, model, {"training": training, "held-out": held_out}, accelerator)
    dpo = DPO(
        model,
        loss=parse_losses(config.loss),
        reference=reference,
        remember_reference=not config.sync_every,
        ld_alpha=config.ld_alpha,
        wpo=config.wpo,
    )
    stage = DPOStage(dpo, collate, sync_every=config.sync_every, sync_alpha=config.sync_alpha)
    loop.stage(stage, config.epochs, config.lr or (1e-4 if config.fresh else 1e-6))
    if accelerator.is_main_process:
        save_policy(policy, dpo.policy_model, run.path, run.settings)
        run.drop_checkpoint()
        plot_curves(run.records(), run.curves)
        say("\n" + before_and_after(run))
        say("\n" + side_by_side(policy, dpo, (prepared.held_out or prepared.training)[0]))
        say(f"\nThe policy, its metrics and curves.png are in {run.path}")
    accelerator.wait_for_everyone()
    return run


def precomputed(
    config: TrainConfig,
    run: RunFolder,
    model: nn.Module,
    parts: dict[str, PreferenceDataset],
    accelerator: Accelerator,
) -> CachedReference:
    """What the model as it is now says of all the data, from the run folder or else computed into it."""
    model.to(accelerator.device)
    of_tokens = config.ld_alpha < 1
    cached = CachedReference(per_token=of_tokens)
    for name, dataset in parts.items():
        bar = tqdm(
            total=len(dataset),
            desc=f"reference, {name}",
            unit="pair",
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
            disable=not accelerator.is_main_process,
        )
        with bar, accelerator.autocast():
            cached |= cache_reference(
                dataset,
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


def side_by_side(policy: Policy, dpo: DPO, pair: TokenPair) -> str:
    """One prompt with what the reference and the policy make of it, each at its most likely."""
    tokenizer = policy.tokenizer
    lines = [f"prompt     {shown(tokenizer.decode(list(pair.prompt)), end=True)}"]
    for name, model in (("reference", dpo.ref_model), ("policy", dpo.policy_model)):
        if model is not None:
            ids = complete(model, list(pair.prompt), COMPLETION_TOKENS, tokenizer.eos_id)
            lines.append(f"{name.ljust(9)}  {shown(tokenizer.decode(ids))}")
    lines.append(f"chosen     {shown(tokenizer.decode(list(pair.chosen)))}")
    return "\n".join(lines)


def shown(text: str, most: int = 300, *, end: bool = False) -> str:
    """Text on one line; of a long one its beginning, or its end."""
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    return f"…{line[-most:]}" if end else f"{line[:most]}…"
