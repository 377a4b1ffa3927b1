"""The training loop of one stage, from its beginning or from the run folder's checkpoint."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from dpo_wrapper.data import StepSampler, TokenizedExample
from dpo_wrapper.models.wrappers import is_sharded
from dpo_wrapper.pretrained import PretrainedModel
from dpo_wrapper.training.best_model import BestEvaluation, load_best, save_best
from dpo_wrapper.training.checkpoint import (
    STATE_FILE,
    FrozenWeights,
    describe_checkpoint,
    load_checkpoint,
    write_checkpoint,
)
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.evaluator import Evaluator
from dpo_wrapper.training.micro_batches import MicroBatches, make_micro_batches
from dpo_wrapper.training.monitoring.monitor import Monitor
from dpo_wrapper.training.monitoring.samples import Samples
from dpo_wrapper.training.monitoring.trackers import Trackers
from dpo_wrapper.training.non_finite import NonFiniteSteps
from dpo_wrapper.training.optimizer import create_schedule
from dpo_wrapper.training.optimizer_steps import OptimizerSteps
from dpo_wrapper.training.out_of_memory import advise_on_steps, advise_on_weights, explain_out_of_memory
from dpo_wrapper.training.prepare import prepare_stage
from dpo_wrapper.training.processes import create_accelerator
from dpo_wrapper.training.run_folder import RunFolder
from dpo_wrapper.training.schedule import plan_schedule
from dpo_wrapper.training.sharding import call_gathered, equalize_batches
from dpo_wrapper.training.stage_plan import Splits
from dpo_wrapper.training.stages import Stage
from dpo_wrapper.training.stopping import (
    EvaluationInterrupted,
    NonFiniteError,
    StoppedBySignal,
    StopRequest,
    TrainingError,
    ignore_signals,
)


class Trainer:
    """Trains the module of one stage in place, and writes metrics and checkpoints to the run folder.

    Args:
        pretrained: the model with its tokenizer, for samples.
        trackers, step_offset: as in `Monitor`.
        save_model: called after the last step, before the evaluation that follows it.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        stage: Stage,
        splits: Splits,
        pretrained: PretrainedModel,
        trackers: Trackers,
        step_offset: int = 0,
        save_model: Callable[[], None] | None = None,
    ) -> None:
        self.config, self.run, self.stage, self.splits = config, run, stage, splits
        self.pretrained, self.save_model = pretrained, save_model
        self.trackers, self.step_offset = trackers, step_offset
        self.accelerator = create_accelerator(config)
        self.sampler = StepSampler(
            len(splits.train),
            config.batch_size,
            stage.epochs,
            config.seed,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        self.num_steps = stage.num_steps
        num_trained = min(len(splits.train) * stage.epochs, self.num_steps * config.batch_size)
        self.schedule = plan_schedule(config, self.num_steps, num_trained, len(splits.eval))
        self.rate_of_step = create_schedule(config, stage.learning_rate, self.num_steps)
        self.module, self.optimizer = prepare_stage(stage, config, self.accelerator)
        frozen = FrozenWeights(stage.module)
        self.non_finite = NonFiniteSteps(
            config.on_nan, stage.name, self.list_sources, lambda text: self.monitor.print(text)
        )
        trained = (self.accelerator, stage, self.module, self.optimizer, self.sampler)
        self.steps = OptimizerSteps(config, *trained, self.non_finite)
        self.has_saved = False  # a checkpoint, of which the size is said once
        self.checkpointed = (self.accelerator, frozen, self.optimizer, stage.reference_cache)

    def train(self) -> None:
        """Run the steps that are not done yet; eval metrics are logged before, during and after.

        Raises:
            TrainingError: the loss or the gradients are not finite, or memory does not suffice.
            StoppedBySignal: SIGINT or SIGTERM came; there is a checkpoint.
        """
        progress, folder = self.run.progress, self.run.checkpoint_folder
        has_state = progress.step > 0 or (folder / STATE_FILE).is_file()
        is_resumed = progress.stage == self.stage.name and has_state
        steps_done = progress.step if is_resumed else 0
        if is_resumed:
            load_checkpoint(folder, *self.checkpointed)
        self.probe_model()
        is_evaluated = is_resumed and progress.is_evaluated
        self.start_watching(steps_done, steps_done + is_evaluated)
        records = self.run.log.read() if is_resumed else []
        self.non_finite.read_records(records)
        records = records if self.config.compares_evaluations else []
        self.best = BestEvaluation(self.config.best_metric, self.stage.name, records)
        with self.monitor:
            last_step = self.run_steps(steps_done, is_evaluated)
            self.end_with_best(last_step)
        self.accelerator.free_memory()

    def start_watching(self, steps_done: int, first_step: int) -> None:
        """Create what logs the stage; `first_step` is the first step that is not evaluated yet."""
        watched = (self.run, self.accelerator, self.stage.name, self.splits.unit, self.schedule)
        self.monitor = Monitor(*watched, steps_done, self.trackers, self.step_offset)
        samples = None
        is_writer = self.accelerator.is_main_process
        if self.config.samples and (is_writer or is_sharded(self.module)):  # where all have to generate
            sampled = (self.run, self.stage, self.splits, self.pretrained)
            samples = Samples(*sampled, self.config.samples, first_step, is_writer=is_writer)
        self.evaluator = Evaluator(
            self.accelerator,
            self.module,
            self.stage,
            self.splits,
            self.schedule,
            self.monitor,
            self.micro_batch_maker,
            samples,
            is_last_stage=self.save_model is not None,
        )

    def run_steps(self, steps_done: int, is_evaluated: bool) -> int:
        """Run the steps that are not done yet, with what is due after each; returns the last one.

        `is_evaluated` says whether the evaluation after the last of `steps_done` is logged.
        """
        with StopRequest() as stop_request:
            if self.accelerator.num_processes == 1:  # others would wait for what is interrupted here
                self.monitor.on_update = stop_request.interrupt
            if not is_evaluated:
                self.evaluate_or_stop(steps_done, stop_request)
            start_time = time.perf_counter()
            for step, batches in enumerate(self.create_step_loader(steps_done), start=steps_done + 1):
                if self.stops_early():
                    return step - 1
                learning_rate = self.set_learning_rate(step)
                metrics = self.train_step(step, batches)
                metrics |= {"lr": learning_rate, "epoch": step * self.stage.epochs / len(self.sampler)}
                if self.stage.reference_cache is not None and step * self.stage.epochs == len(self.sampler):
                    self.stage.reference_cache.gather_from_processes()  # once, after the first epoch
                seconds = time.perf_counter() - start_time
                self.monitor.log_step(step, metrics, self.sampler.step_size(step - 1), seconds)
                self.save_or_stop(step, stop_request)
                self.evaluate_or_stop(step, stop_request)
                start_time = time.perf_counter()
        return self.num_steps

    def list_sources(self, step: int) -> list[str]:
        """Where the rows of a step come from, over all processes."""
        return [self.splits.train[index].source for index in self.sampler.global_step(step - 1)]

    def stops_early(self) -> bool:
        """Whether too many evaluations in a row were no better than the best one."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.best.num_worse >= patience

    def end_with_best(self, last_step: int) -> None:
        """Take the weights of the best evaluation, if that is asked for, and log how the stage ends."""
        is_early = last_step < self.num_steps
        if is_early:
            self.monitor.print(
                f"{self.stage.name} stops after step {last_step} of {self.num_steps}: "
                f"{self.best.num_worse} evaluations were no better than {self.best}."
            )
            if self.schedule.save_steps:
                self.save_checkpoint(last_step, is_evaluated=True, is_trained=True)
        takes_best = self.config.keep_best and self.best.step != last_step
        if takes_best:
            self.accelerator.wait_for_everyone()
            load_best(self.stage.model, self.run.best_file)
            self.monitor.print(f"{self.stage.name} ends with the weights after {self.best}.")
        if is_early or takes_best:
            if self.save_model is not None:
                self.save_model()
            self.evaluator.evaluate_end(last_step)

    def set_learning_rate(self, step: int) -> float:
        """Set the learning rate of a step, which counts from 1, and return it."""
        learning_rate = self.rate_of_step(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        return learning_rate

    def probe_model(self) -> None:
        """Find out, and say, how the model takes sequences, which decides how batches of them are made."""
        batch = self.stage.collate_fn(self.splits.train[:1]).to(self.accelerator.device)
        try:
            with self.accelerator.autocast():
                call_gathered(self.module, lambda: self.stage.scorer.check(batch.sequences))
        except (TypeError, ValueError) as error:  # a model that the probe refuses
            raise TrainingError(str(error)) from error
        self.accelerator.print(f"{self.stage.name}: {self.stage.scorer.explain()}", flush=True)

    def train_step(self, step: int, batches: list[Any]) -> dict[str, float]:
        """Run one optimizer step on this process's micro-batches; the metrics are of all processes."""
        batches = equalize_batches(self.accelerator, self.stage, batches, self.splits.train)
        return self.steps.run(step, batches)

    def evaluate_or_stop(self, step: int, stop_request: StopRequest) -> None:
        """Evaluate and sample where that is due; a signal stops that, and the run, which will do it again."""
        log_bytes = self.run.log.count_bytes()
        try:
            self.evaluate_if_due(step)
        except EvaluationInterrupted:
            self.run.log.cut(log_bytes)
            self.save_or_stop(step, stop_request)
        except NonFiniteError:
            if self.accelerator.is_main_process:
                self.run.set_status("training")  # whatever model it has saved
            raise
        self.save_or_stop(step, stop_request, is_evaluated=True)

    def evaluate_if_due(self, step: int) -> None:
        """Evaluate and sample where that is due; at the end of the stage the model is saved first."""
        if step == self.num_steps and self.save_model is not None:
            self.save_model()
        what = f"the evaluation after step {step} of {self.stage.name}"
        with explain_out_of_memory(what, partial(advise_on_steps, self.config, trains=False)):
            metrics = self.evaluator.evaluate_if_due(step)
        if metrics is not None and self.config.compares_evaluations:
            self.compare_evaluation(step, metrics)

    def compare_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Note whether an evaluation is the best of the stage, and keep the weights of the best."""
        is_best = self.best.observe(step, metrics)
        is_writer = self.accelerator.is_main_process
        if is_best and self.config.keep_best and (is_writer or is_sharded(self.module)):
            save_best(self.stage.model, self.run.best_file, is_writer=is_writer)

    def create_step_loader(self, steps_done: int) -> DataLoader[Any]:
        """This process's micro-batches of each step that is not done yet."""
        return DataLoader(
            self.sampler,  # type: ignore[arg-type]
            batch_size=None,
            sampler=range(steps_done, self.num_steps),
            collate_fn=self.micro_batch_maker(self.splits.train),
            num_workers=self.config.num_workers,
            worker_init_fn=ignore_signals,
            pin_memory=self.accelerator.device.type == "cuda",
            generator=torch.Generator(),  # so that it draws no seed from the global generator
        )

    def micro_batch_maker(self, examples: Sequence[TokenizedExample]) -> Callable[[list[int]], MicroBatches]:
        """The function that makes micro-batches of the examples at some indices. It holds no model."""
        is_padded = self.stage.scorer.tree_options is None
        options = (self.stage.collate_fn, self.config.micro_batch_tokens, is_padded)
        return partial(make_micro_batches, examples, *options)

    def save_or_stop(self, step: int, stop_request: StopRequest, is_evaluated: bool = False) -> None:
        """Write a checkpoint if one is due; after a signal write one and raise StoppedBySignal."""
        number = stop_request.number or 0
        if self.accelerator.num_processes > 1:  # a signal may reach processes in different steps
            numbers = torch.tensor([number], device=self.accelerator.device)
            number = int(self.accelerator.gather(numbers).max())
        save_steps = self.schedule.save_steps
        is_due = save_steps > 0 and self.schedule.is_due(save_steps, step)
        is_due |= self.config.keep_best and step == self.num_steps  # the model that is saved may not stay
        if number or (is_due and not is_evaluated):
            what = f"the checkpoint after step {step} of {self.stage.name}"
            with explain_out_of_memory(what, partial(advise_on_weights, self.config)):
                self.save_checkpoint(step, is_evaluated, is_trained=step == self.num_steps)
        if number:
            self.accelerator.wait_for_everyone()  # torchrun ends all processes as soon as one ends
            raise StoppedBySignal(number)

    def save_checkpoint(self, step: int, is_evaluated: bool, is_trained: bool) -> None:
        """Write a checkpoint; the ones before stay until it is complete."""
        position = {"is_evaluated": is_evaluated, "is_trained": is_trained}
        with (
            self.monitor.measure("save", "writing a checkpoint"),
            self.run.new_checkpoint(self.accelerator, self.stage.name, step, **position) as folder,
        ):
            write_checkpoint(folder, *self.checkpointed)
        if self.accelerator.is_main_process and not self.has_saved:
            self.monitor.print(describe_checkpoint(self.run.checkpoint_folder, self.config.save_steps))
        self.has_saved = True
