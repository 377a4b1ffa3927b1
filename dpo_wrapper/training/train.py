"""Train a model on a file of preferences: `train(TrainConfig(data = ...))`."""

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from dpo_wrapper.data import scored_sequences
from dpo_wrapper.data.trained_prompts import TRAINED_PROMPTS_FILE, write_trained_prompts
from dpo_wrapper.display.terminal import create_progress_bar, hide_sharing_warnings, print_line
from dpo_wrapper.dpo import DPO
from dpo_wrapper.evaluation.exact_answers import ExactAnswers
from dpo_wrapper.evaluation.generate import list_end_ids
from dpo_wrapper.evaluation.report import format_before_and_after
from dpo_wrapper.evaluation.samples import format_samples, select_last_samples
from dpo_wrapper.losses import CombinedLoss, parse_losses
from dpo_wrapper.pretrained import rescales_in_eval_mode, save_pretrained
from dpo_wrapper.reference import CachedReference, precompute_ref_log_probs
from dpo_wrapper.reference.build import ReferenceKind
from dpo_wrapper.reference.reference import FrozenModel
from dpo_wrapper.reference.sharding import is_sharded_tensor
from dpo_wrapper.scoring import Scorer
from dpo_wrapper.training.config import STAGES, TrainConfig
from dpo_wrapper.training.flags_in_errors import flags_in_errors
from dpo_wrapper.training.model_card import write_model_card
from dpo_wrapper.training.monitoring.figure import Figure
from dpo_wrapper.training.monitoring.report_line import count_examples
from dpo_wrapper.training.monitoring.trackers import Trackers
from dpo_wrapper.training.out_of_memory import advise_on_weights, explain_out_of_memory
from dpo_wrapper.training.policy import compile_layers
from dpo_wrapper.training.processes import create_accelerator, describe_machine
from dpo_wrapper.training.reference_words import describe_merging, describe_reference
from dpo_wrapper.training.run_folder import RunFolder
from dpo_wrapper.training.run_page import write_run_page
from dpo_wrapper.training.setup import TrainSetup, load_stage_policy, set_up_training
from dpo_wrapper.training.sharding import whole_weights
from dpo_wrapper.training.stage_plan import Splits, StagePlan
from dpo_wrapper.training.stages import DPOStage, SFTStage, Stage
from dpo_wrapper.training.stopping import explain_lost_process
from dpo_wrapper.training.trainer import Trainer
from dpo_wrapper.training.write_errors import explain_write_errors


def train(config: TrainConfig) -> RunFolder:
    """Train a model as `dpo-wrapper train` does; the run folder holds the result.

    Raises:
        ValueError, TypeError, OSError, ImportError: as in `set_up_training`.
        TrainingError, StoppedBySignal: as in `run_training`.
    """
    return run_training(set_up_training(config))


@flags_in_errors()
def run_training(setup: TrainSetup) -> RunFolder:
    """Run supervised training (if there are epochs of it) and preference training; report the result.

    Raises:
        TrainingError: the loss is not finite, memory does not suffice, or the run folder cannot be written.
        StoppedBySignal: SIGINT or SIGTERM came during training; there is a checkpoint.
    """
    try:
        with (
            hide_sharing_warnings(),
            explain_write_errors(setup.run.path),
            explain_lost_process(),
            explain_out_of_memory("the run", partial(advise_on_weights, setup.config)),
        ):
            run_stages(setup)
    finally:
        setup.run.unlock()
    return setup.run


def run_stages(setup: TrainSetup) -> None:
    config, run = setup.config, setup.run
    accelerator = create_accelerator(config)
    accelerator.wait_for_everyone()  # all have read the folder
    if accelerator.is_main_process:
        run.open()
        if not (run.path / TRAINED_PROMPTS_FILE).exists():  # where a run began may be gone when it goes on
            write_trained_prompts(run.path, setup.stages[-1].trained_prompts)
    accelerator.wait_for_everyone()
    notes = (*(describe_plan(plan, config) for plan in setup.stages), *setup.notes)
    accelerator.print(*run.notes, describe_size(setup.pretrained.model), *notes, sep="\n", flush=True)
    if setup.stages[-1].name != "dpo":
        report_merging(setup, accelerator)

    def save_model() -> None:
        save_policy(setup, run.path, run.new_model_folder(), accelerator)
        accelerator.wait_for_everyone()

    if run.needs_training:
        if accelerator.is_main_process:
            run.note_machine(describe_machine(accelerator))
        with Trackers(config, run) as trackers:
            step_offset = 0
            for plan, following in zip_longest(setup.stages, setup.stages[1:]):
                if STAGES.index(run.progress.stage) <= STAGES.index(plan.name):
                    set_seed(config.seed)  # what dropout draws is the same in a run that is resumed here
                    stage = create_stage(setup, plan, accelerator)
                    if isinstance(stage, DPOStage):
                        report_reference(setup, stage.dpo, accelerator)
                    parts = (config, run, stage, plan.splits, setup.pretrained, trackers, step_offset)
                    Trainer(*parts, save_model=None if following else save_model).train()
                    if following is not None:
                        save_stage(setup, plan, following, accelerator)
                        setup = with_whole_policy(setup, plan)
                step_offset += plan.num_steps
    if accelerator.is_main_process:
        report_results(setup)
        run.finish()
    accelerator.wait_for_everyone()


def save_stage(setup: TrainSetup, plan: StagePlan, following: StagePlan, accelerator: Accelerator) -> None:
    """Save the model as it is after a stage, from which the following one starts."""
    run = setup.run
    save_policy(setup, run.stage_folder(plan.name), run.new_stage_folder(plan.name), accelerator)
    if accelerator.is_main_process:
        write_trained_prompts(run.stage_folder(plan.name), plan.trained_prompts)
    with run.new_checkpoint(accelerator, following.name, 0):
        pass


def save_policy(
    setup: TrainSetup, path: Path, new_folder: AbstractContextManager[Path], accelerator: Accelerator
) -> None:
    """Save the model as it is now, into a new folder whose files are in `path` afterwards."""
    model, is_writer = setup.pretrained.model, accelerator.is_main_process
    bar = create_progress_bar("saving the model", is_main_process=is_writer, leave=False)
    with bar, whole_weights(model, is_needed=is_writer):
        if is_writer:
            print_line(f"saving the model in {path}")
            with new_folder as folder:
                save_pretrained(setup.pretrained, model, folder)


def with_whole_policy(setup: TrainSetup, plan: StagePlan) -> TrainSetup:
    """The set-up with the model as it was saved after a stage, if the stage has sharded it."""
    if not any(map(is_sharded_tensor, setup.pretrained.model.parameters())):
        return setup
    folder = str(setup.run.stage_folder(plan.name))
    return replace(setup, pretrained=load_stage_policy(setup.config, setup.run, folder)[0])


def describe_size(model: nn.Module) -> str:
    """The model's class and its number of parameters; with an adapter or frozen ones, of those that train."""
    inner: Any = model
    named = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    parameters = list(model.parameters())
    total, trained = (
        sum(p.numel() for p in some) for some in (parameters, [p for p in parameters if p.requires_grad])
    )
    size = f"{type(named).__name__} with {format_count(total)} parameters"
    return size if trained == total else f"{size}, of which {format_count(trained)} train"


def format_count(number: int) -> str:
    return f"{number / 1e6:.1f}M" if number >= 1e5 else f"{number:,}"


def report_reference(setup: TrainSetup, dpo: DPO, accelerator: Accelerator) -> None:
    """Print what the reference is and what an adapter is merged into, and note the reference in run.json."""
    before = [plan.name for plan in setup.stages if plan.name != "dpo"]
    stage_before = before[-1] if before else None
    sentence = describe_reference(dpo.reference, setup.pretrained, setup.config, stage_before)
    accelerator.print(sentence, flush=True)
    report_merging(setup, accelerator)
    if accelerator.is_main_process:
        setup.run.note_reference(sentence)


def report_merging(setup: TrainSetup, accelerator: Accelerator) -> None:
    """Print what the adapter, if the run has one, is merged into."""
    if setup.pretrained.adapter is not None:
        accelerator.print(describe_merging(setup.pretrained.adapter, setup.run.path))


def describe_plan(plan: StagePlan, config: TrainConfig) -> str:
    """What a stage is trained on, in words."""
    splits = plan.splits
    examples = f"{len(splits.train):,} train and {count_examples(len(splits.eval), f'eval {splits.unit}')}"
    epochs, steps = (
        f"{n:,} {noun}{'s' * (n != 1)}" for n, noun in ((plan.epochs, "epoch"), (plan.num_steps, "step"))
    )
    is_short = config.max_steps is not None and plan.num_steps == config.max_steps
    length = f"at most {epochs}, {steps}" if is_short else f"{epochs}, {steps}"
    loss = f", loss {config.loss}" if plan.name == "dpo" else ""
    return f"{plan.name}: {examples}, {length}, learning rate {plan.learning_rate:.2g}{loss}"


def create_stage(setup: TrainSetup, plan: StagePlan, accelerator: Accelerator) -> Stage:
    """What `Trainer` runs for a stage, with the model as it is now."""
    model, config = setup.pretrained.model, setup.config
    if plan.name == "dpo":
        stage = DPOStage(plan, build_dpo(setup, plan.splits, accelerator), config)
        end_ids = list_end_ids(setup.pretrained.tokenizer)
        answers = ExactAnswers(
            plan.splits.eval, config.exact_answers, end_ids, setup.pretrained.max_positions
        )
        stage.exact_answers = answers if answers.examples else None
        return stage
    return SFTStage(plan, model, config)


def build_dpo(setup: TrainSetup, splits: Splits, accelerator: Accelerator) -> DPO:
    """The policy with its reference, which is the model as it is now."""
    config, model = setup.config, setup.pretrained.model
    needs_copy = config.ref_model_sync_steps or config.reference_dtype or config.reference_device
    reference: ReferenceKind | CachedReference = "copy" if needs_copy else config.reference
    loss = parse_losses(config.loss)
    is_needed = CombinedLoss(loss).needs_reference and reference != "none"
    if config.precompute_ref_log_probs:
        reference = precompute_reference(setup, splits, accelerator)
    dpo = DPO(
        model,
        loss=loss,
        reference=reference,
        reference_dtype=getattr(torch, config.reference_dtype) if config.reference_dtype else None,
        reference_device=config.reference_device,
        cache_ref_log_probs=is_needed
        and not (config.ref_model_sync_steps or config.precompute_ref_log_probs),
        ld_alpha=config.ld_alpha,
        wpo=config.wpo,
        disable_dropout=not (config.lora_dropout or rescales_in_eval_mode(model)),
        router_aux_loss_coef=config.router_aux_loss_coef,
        share_prefix=config.prefix_sharing,
    )
    if config.torch_compile and dpo.ref_model is not None:
        compile_layers(dpo.ref_model)  # a copy is not compiled, and should round as the policy does
    return dpo


def precompute_reference(setup: TrainSetup, splits: Splits, accelerator: Accelerator) -> CachedReference:
    """The log-probs of all examples under the model as it is now, kept in the run folder."""
    config, model = setup.config, setup.pretrained.model
    model.to(accelerator.device)
    (setup.run.path / "reference").mkdir(exist_ok=True)  # raises where the run folder is gone
    per_token = config.ld_alpha < 1
    cached = CachedReference(per_token=per_token)
    scorer = Scorer(model, share_prefix=config.prefix_sharing)
    first = scored_sequences(splits.train[:1], config.micro_batch_tokens)[0]
    with accelerator.autocast():
        is_padded = scorer.check(first.to(accelerator.device)).tree is None
    for name, examples in (("train", splits.train), ("eval", splits.eval)):
        sequences = scored_sequences(examples, config.micro_batch_tokens, is_padded=is_padded)
        total = sum(len(batch.length) for batch in sequences)
        accelerator.print(f"computing the reference's log-probs of {total:,} {name} sequences", flush=True)
        options = {"is_main_process": accelerator.is_main_process, "total": total}
        bar = create_progress_bar(f"reference, {name}", "sequence", **options)
        folder = setup.run.path / "reference" / name
        with bar, accelerator.autocast():
            cached |= precompute_ref_log_probs(
                sequences, FrozenModel(scorer), folder, per_token=per_token, progress=bar.update
            )
    return cached


def report_results(setup: TrainSetup) -> None:
    """Write the figure, the model card and the page; print metrics before and after training, and samples."""
    run, plan = setup.run, setup.stages[-1]
    records = run.log.read()
    Figure(run).draw()
    write_model_card(setup, records)
    write_run_page(setup, records)
    of_stage = [record for record in records if record["stage"] == plan.name]
    print("\n" + format_before_and_after(of_stage))
    if samples := select_last_samples(run.read_samples(), plan.name):
        print("\n" + format_samples(samples))
    print(f"\nThe model, its metrics and {run.page_file.name} are in {run.path}")
