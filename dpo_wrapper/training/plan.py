"""Print what a run would take, without a trace of it: `dpo-wrapper train --plan`."""

import tempfile
from dataclasses import replace
from pathlib import Path

from dpo_wrapper.display.terminal import hide_sharing_warnings
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.estimate import estimate_stage, format_estimate
from dpo_wrapper.training.flags_in_errors import flags_in_errors
from dpo_wrapper.training.monitoring.trackers import Trackers
from dpo_wrapper.training.processes import create_accelerator
from dpo_wrapper.training.setup import set_up_training
from dpo_wrapper.training.sharding import find_fsdp_plugin
from dpo_wrapper.training.train import create_stage, describe_plan, describe_size
from dpo_wrapper.training.trainer import Trainer


@flags_in_errors()
def plan_run(config: TrainConfig) -> None:
    """Measure a few steps of each stage of a run, and print what the run would take.

    Tokens are those of the run, memory and time those of this machine. Time is without loading, samples,
    exact answers and checkpoints. The run folder is left alone.

    Raises:
        ValueError, TypeError, OSError, ImportError: as in `set_up_training`.
        TrainingError: the model cannot be trained.
    """
    if find_fsdp_plugin(config) is not None:
        raise ValueError(
            "--plan should be asked for by one process, but weights are sharded: leave --fsdp out."
        )
    with tempfile.TemporaryDirectory() as folder, hide_sharing_warnings():
        setup = set_up_training(
            replace(config, out=Path(folder), report_to=(), precompute_ref_log_probs=False, resume=False)
        )
        accelerator = create_accelerator(setup.config)
        accelerator.print(describe_size(setup.pretrained.model), *setup.notes, sep="\n", flush=True)
        trackers = Trackers(setup.config, setup.run)
        for plan in setup.stages:
            accelerator.print(f"{describe_plan(plan, setup.config)}\n  measuring some steps ...", flush=True)
            stage = create_stage(setup, plan, accelerator)
            trainer = Trainer(setup.config, setup.run, stage, plan.splits, setup.pretrained, trackers)
            estimate = estimate_stage(trainer)
            accelerator.print(format_estimate(estimate), flush=True)
